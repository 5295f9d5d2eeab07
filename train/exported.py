"""An ONNX file that `zoo export` wrote, opened for `zoo predict`: the metadata say how images go in and what comes out."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train import config as configuration
from train.schema import AugmentConfig, Config, DataConfig, InferConfig
from train.show import Names
from train.tasks import Task

KEY = "backbone_zoo"  # of the metadata, a JSON text
EXTRA = 'pip install "backbone-zoo[export]"'


class OnnxModel(nn.Module):
    """Images B C H W, float32 -> the outputs of an ONNX file, computed by onnxruntime on the CPU."""

    def __init__(self, path: str | Path):
        super().__init__()
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # says where and in which type images are wanted
        if importlib.util.find_spec("onnxruntime") is None:
            raise ImportError(f"predicting with an ONNX file needs onnxruntime: {EXTRA}")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a failure becomes an error below
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no file {path}")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen kinds of its own
            raise ValueError(f"{path} is no ONNX file that onnxruntime reads: {str(error).strip().splitlines()[0]}") from error
        self.input = self.session.get_inputs()[0]
        self.names = [output.name for output in self.session.get_outputs()]

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        for axis, (side, wanted) in enumerate(zip(images.shape, self.input.shape, strict=True)):
            if isinstance(wanted, int) and side != wanted:
                what = ("batches", "channels", "images of height", "images of width")[axis]
                raise ValueError(f"{self.path} takes {what} {wanted}, got {side}; export it with --dynamic batch,hw")
        dtype = torch.float16 if self.input.type == "tensor(float16)" else torch.float32
        values = [
            torch.from_numpy(v).float() for v in self.session.run(None, {self.input.name: images.cpu().to(dtype).numpy()})
        ]
        return values[0] if len(values) == 1 and self.names == ["output"] else dict(zip(self.names, values, strict=True))

    def metadata(self) -> dict[str, Any]:
        """What `zoo export` wrote into the file. Raises ValueError if another program made it."""
        text = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        try:
            about = json.loads(text) if text is not None else None
        except ValueError as error:
            raise ValueError(f"{self.path}: the metadata {KEY!r} are damaged ({error}); export it again") from error
        if not isinstance(about, dict) or "task" not in about:
            raise ValueError(f"{self.path} was not made by zoo export: it does not say its task, image size, mean and std")
        return about


def open_onnx(path: str | Path) -> tuple[Config, Task, OnnxModel, Names]:
    """(configuration, task, model, class names) of an ONNX file, as `open_run` gives those of a run.

    Raises FileNotFoundError for a file that is not there, ValueError for one that `zoo export` has not made.
    """
    model = OnnxModel(path)
    about = model.metadata()
    try:
        data = DataConfig(
            size=tuple(about["size"]),
            eval_resize=tuple(about["eval_resize"]) if isinstance(about["eval_resize"], list) else about["eval_resize"],
            mean=tuple(about["mean"]),
            std=tuple(about["std"]),
            image_range=about["image_range"] and tuple(about["image_range"]),
        )
        infer: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in about["infer"].items()
        }
        config = Config(task=about["task"], data=data, infer=InferConfig(**infer))
        config.augment = AugmentConfig(eval_crop=about["eval_crop"], interpolation=about["interpolation"])
        config.model.backbone, config.model.in_chans = about["backbone"], about["in_chans"]
        names = Names(about["names"]["classes"], about["names"]["palette"])
        task = configuration.build_task(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the metadata {KEY!r} lack something ({error!r}); export it again") from error
    return config, task, model, names
