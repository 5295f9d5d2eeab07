"""A trained model out of its run folder, with the photographs' way into it.

How runs are kept is the business of the package that trains, which this one works without: it is named here and imported when
a run is opened.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

OPENER = ("train.prediction", "open_model")  # (folder, weights, overrides, device) -> (model, pipeline)


class FromRun(nn.Module):
    """A model that a run folder holds, and that then takes photographs: `from_run(folder).predict("photo.jpg")`.

    pipeline: reads, sizes and normalises photographs as the run did and says what outputs mean; None for a model that was made
    in another way.
    """

    pipeline: Any = None

    @staticmethod
    def from_run(
        folder: str | Path, weights: str = "model.safetensors", overrides: Sequence[str] = (), device: str | None = None
    ) -> Any:
        """The trained model of a run, in evaluation mode, whose `predict` takes photographs.

        Returns what the run trained: a DensePredictor, a MultiPredictor for several tasks, a RunModel for any other task.
        Raises FileNotFoundError if the folder is no run, ImportError if the package that trains is missing.

        Args:
            folder: of the run.
            weights: file in it: model.safetensors (best) or last.safetensors.
            overrides: configuration keys of the run to change, as "--data.max_pixels=1e9".
            device: "cpu", "cuda", ...; None: the run's own, else the GPU where there is one.
        """
        try:
            opener = getattr(import_module(OPENER[0]), OPENER[1])
        except ModuleNotFoundError as error:
            raise ImportError(f"opening a run needs {error.name}: pip install 'backbone-zoo[train]'") from error
        model, pipeline = opener(folder, weights, overrides, device)
        if not isinstance(model, FromRun):
            model = RunModel(model)
        model.pipeline = pipeline
        return model.eval()

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, device: str | None = None) -> Any:
        """The trained model that `zoo push` wrote into a folder, or onto the Hugging Face hub as user/name.

        Nothing that was fetched is executed. Raises FileNotFoundError for a folder that is not there, ImportError without
        huggingface_hub, ValueError for what the hub does not give.

        Args:
            source: folder, or user/name.
            revision: branch, tag or commit on the hub.
            device: None: the GPU where there is one.
        """
        if Path(source).is_dir():
            return cls.from_run(source, device=device)
        if str(source).count("/") != 1 or str(source).startswith((".", "/")):
            raise FileNotFoundError(f"{source} is neither a folder nor user/name on the hub")
        try:
            from huggingface_hub import snapshot_download
        except ImportError as error:
            raise ImportError('the hub needs huggingface_hub: pip install "backbone-zoo[hub]"') from error
        try:
            folder = snapshot_download(str(source), revision=revision, allow_patterns=["config.yaml", "model.safetensors"])
        except Exception as error:  # the hub's client has many kinds
            raise ValueError(f"the hub does not give {source}: {str(error).strip().splitlines()[0]}") from error
        return cls.from_run(folder, device=device)

    def predict(self, photos: Any) -> Any:
        """The prediction for a photograph, at its own size; a list of predictions for a list.

        It has `.mask`, `.depth` or `.probabilities`, `.top(5)` for labels, `.overlay()` and `.save()`, see
        train/prediction.py. Raises ValueError for what is no photograph, and for a model that came from no run.

        Args:
            photos: a path, a PIL image, an array H W C or a tensor C H W (bytes, or floats of 0..1), or a list of these.
        """
        if self.pipeline is None:
            raise ValueError(
                f"this {type(self).__name__} does not know how its images are normalised and what its outputs mean: open a "
                "run with from_run(folder), or call the model on normalised images"
            )
        return self.pipeline(self.trained(), photos)

    def trained(self) -> nn.Module:
        """The module that the run's task built."""
        return self


class RunModel(FromRun):
    """Any other model of a run, `model`: a classifier of timm's, or what another task builds."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)

    def trained(self) -> nn.Module:
        return self.model
