"""From any form of a photograph to the prediction of a run's model: what `predict` of a model and `zoo predict` share."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from backbones.analysis.run import evaluation
from train.data.files import PixelRules, array_image, image_array, read_image
from train.evaluation import inference, open_run
from train.inference import Predictor
from train.loader import collate
from train.schema import Config
from train.show import Names, Panel, Show, to_rgb
from train.tasks import Task
from train.transforms import build_transform

Photo = str | Path | Image.Image | np.ndarray | Tensor


class Prediction:
    """What a model says of one photograph, at the photograph's own size.

    By task it has `mask` (class ids H W), `depth` (metres H W; `inverse_depth` or `relative_depth` where the model knows no
    scale), `probabilities` (K, or K H W of a segmentation): tensors on the CPU. Asking for what it has not raises
    AttributeError with what there is. `size` is (H, W).

    Args:
        image: the photograph upright, uint8 H W 3.
        path: of the file, or what the photograph was called.
        value: what the task predicts.
        show: draws it.
        names: of the classes, and their colours.
        scores: gives the probabilities when asked; None: there are none.
    """

    def __init__(
        self, image: np.ndarray, path: str, value: Any, show: Show, names: Names, scores: Callable[[], Tensor] | None = None
    ):
        self.image, self.path, self.names = image, path, names
        self.size = (image.shape[0], image.shape[1])
        self.value = value  # as the task's `predict` returns it
        self._show, self._scores = show, scores
        self._fields = show.fields(value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask before anything is there
            raise AttributeError(name)
        if name in self._fields:
            return self._fields[name]
        if name == "probabilities" and self._scores is not None:
            return self._scores()
        raise AttributeError(f"this prediction has no {name!r}; it has {', '.join(self.fields())}")

    def fields(self) -> list[str]:
        """Names of what was predicted."""
        return [*self._fields, *(["probabilities"] if self._scores is not None else [])]

    def __repr__(self) -> str:
        return f"Prediction({self.path!r}, {self.size[0]}x{self.size[1]}, {', '.join(self.fields())})"

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """The best classes of a classification with their probabilities, best first; a class without a name is its number."""
        shares = self._fields.get("probabilities")
        if shares is None:
            raise AttributeError("top() is for a label per image, and this model predicts maps: see .mask or .depth")
        best = shares.topk(min(count, len(shares)))
        labels = self.names.classes or list(map(str, range(len(shares))))
        return [(labels[int(i)], float(share)) for share, i in zip(best.values, best.indices, strict=True)]

    def overlay(self, legend: bool = True) -> Image.Image:
        """The prediction over the photograph; legend: a strip below with the classes that occur, or the scale of depth."""
        return Image.fromarray(self._show.picture(self.image, self.value, self.names, legend))

    def panels(self) -> list[Panel]:
        """Photograph and prediction as a row of a sheet."""
        return self._show.panels(self.image, {}, as_measured(self.value), self.names)

    def save(self, where: str | Path = ".", overwrite: bool = False) -> list[Path]:
        """Write the files that `zoo predict` writes, and return them.

        Raises FileExistsError for a file that is there, unless overwrite.

        Args:
            where: a folder that exists, in which files begin with the photograph's name; or folder and beginning of the names.
            overwrite: replace files.
        """
        stem = Path(where)
        if stem.is_dir():
            stem = stem / Path(self.path).stem
        taken = [path for path in self._show.outputs(stem) if path.exists()]
        if taken and not overwrite:
            raise FileExistsError(f"{taken[0]} exists; choose another name, or overwrite=True")
        return self.write(stem)

    def write(self, stem: Path) -> list[Path]:
        """Write the files under hidden names that become the right ones when all are there: no half a file, however it ends."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        files, hidden = self._show.outputs(stem), stem.with_name(f".{stem.name}")
        try:
            written = self._show.write(hidden, self.image, self.value, self.names)
        except BaseException:
            for temporary in self._show.outputs(hidden):
                temporary.unlink(missing_ok=True)
            raise
        for temporary, file in zip(written, files, strict=True):
            temporary.replace(file)
        return files


def as_measured(value: Any) -> Any:
    """A prediction of one image in the form in which a task's `measure` gives it to the pictures: dense maps in a list."""
    if isinstance(value, dict):
        return {name: as_measured(part) for name, part in value.items()}
    return [value] if isinstance(value, Tensor) and value.ndim > 2 else value


class Pipeline:
    """How a run sees photographs: reading, size and normalisation, windows and flips, and what its outputs mean."""

    def __init__(self, config: Config, task: Task, names: Names):
        if task.show is None:
            raise ValueError(f"task {config.task['name']} makes no predictions that could be shown")
        data = config.data
        assert data.mean is not None and data.std is not None  # filled in when the configuration was read
        self.config, self.task, self.names, self.show = config, task, names, task.show
        self.rules = PixelRules(config.model.in_chans, data.image_range, data.max_pixels)
        targets, resize = task.targets("val"), data.eval_resize
        self.transform = build_transform(False, targets, data.size, data.mean, data.std, config.augment, eval_resize=resize)

    def pixels(self, photo: Photo, name: str = "image") -> tuple[Tensor, str]:
        """(uint8 C H W, upright, with the channels of the model; the path, or `name`).

        Raises FileNotFoundError, and ValueError for what is no photograph.

        Args:
            photo: a path; a PIL image; an array H W or H W C; a tensor C H W. Numbers are bytes, or floats of 0..1.
            name: of one that is no file.
        """
        if isinstance(photo, str | Path):
            return torch.from_numpy(np.ascontiguousarray(read_image(Path(photo), rules=self.rules))), str(photo)
        if isinstance(photo, Image.Image):
            named = str(getattr(photo, "filename", "") or name)
            return torch.from_numpy(np.ascontiguousarray(image_array(ImageOps.exif_transpose(photo), named, self.rules))), named
        values: np.ndarray
        if isinstance(photo, Tensor):
            moved = photo.detach().cpu()
            values = (moved.float() if moved.is_floating_point() else moved).numpy()
        elif isinstance(photo, np.ndarray):
            values = photo
        else:
            raise TypeError(
                f"{name} is a {type(photo).__name__}: give a path, a PIL image, an array, a tensor, or a list of them"
            )
        if values.ndim not in (2, 3):
            raise ValueError(f"{name} has shape {tuple(values.shape)}: give images one by one, or as a list")
        if values.ndim == 3 and isinstance(photo, np.ndarray):
            values = values.transpose(2, 0, 1)
        if values.dtype.kind == "f" and self.rules.image_range is None:
            low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"{name} has numbers of {low:g} to {high:g}: give bytes, or floats of 0..1 that nothing normalised"
                )
            values = (values * 255).round().astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(array_image(channels_first(values, name), name, self.rules))), name

    @torch.no_grad()
    def run(self, model: nn.Module, pixels: Tensor, path: str) -> Prediction:
        """The prediction for uint8 C H W, with the model where it is."""
        like = next(model.parameters())
        batch = collate([self.transform({"image": pixels, "path": path})])
        size = (pixels.shape[-2], pixels.shape[-1])
        with evaluation(model):
            through = inference(self.task, model, self.config)
            output = self.task.forward(through, {**batch, "image": batch["image"].to(like.device, like.dtype)})
        averaged = isinstance(through, Predictor)
        scores = None
        if self.task.gives_probabilities:  # made when they are asked for: K maps of a large photograph are much memory
            scores = partial(self.probabilities, output, size, averaged)
        return Prediction(to_rgb(pixels), path, self.task.predict(output, size), self.show, self.names, scores)

    def probabilities(self, output: Any, size: tuple[int, int], averaged: bool) -> Tensor:
        """K H W of one image's output, on the CPU."""
        return self.task.probabilities(output, size, averaged)[0].float().cpu()

    def predict(self, model: nn.Module, photo: Photo, name: str = "image") -> Prediction:
        """The prediction for a photograph in any form."""
        return self.run(model, *self.pixels(photo, name))

    def __call__(self, model: nn.Module, photos: Any) -> Any:
        """A prediction, or a list of them for a list. ValueError for an empty list."""
        if not isinstance(photos, list | tuple):
            return self.predict(model, photos)
        if not photos:
            raise ValueError("no photographs to predict: the list is empty")
        return [self.predict(model, photo, f"image_{i}") for i, photo in enumerate(photos)]


def channels_first(values: np.ndarray, name: str) -> np.ndarray:
    """C H W, refused where the channels seem to be the last axis."""
    if values.ndim == 3 and values.shape[0] > 4 and values.shape[2] in (1, 3, 4):
        raise ValueError(f"{name} has shape {values.shape} as C H W: an array is H W C, a tensor C H W")
    return values


def open_model(
    folder: str | Path, weights: str = "model.safetensors", overrides: Sequence[str] = (), device: str | None = None
) -> tuple[nn.Module, Pipeline]:
    """A run's model in evaluation mode, and how it sees photographs.

    Raises FileNotFoundError if the folder is no run, ValueError for overrides that its weights do not fit.

    Args:
        folder: of the run, or an ONNX file that `zoo export` wrote, which runs on the CPU and takes no overrides.
        weights: file in it.
        overrides: configuration keys, as "--data.max_pixels=1e9".
        device: None: the run's own, else the GPU where there is one.
    """
    if Path(folder).suffix == ".onnx":
        from train.exported import open_onnx

        if overrides:
            raise ValueError(f"{folder} is a program, which {overrides[0]!r} cannot change: export it again, or name the run")
        config, task, network, names = open_onnx(folder)
        return network, Pipeline(config, task, names)
    config, task, model, names = open_run(folder, overrides, weights)
    pipeline = Pipeline(config, task, names)
    where = device or config.run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(where), pipeline
