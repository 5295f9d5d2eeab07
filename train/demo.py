"""`zoo demo`: a page in the browser that shows what a run or a model makes of a photograph (Gradio, the extra `demo`)."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from backbones.analysis.run import evaluation
from heads import HEADS, DensePredictor
from train import config as configuration
from train.analyze import Subject, open_subject
from train.checks import nearest
from train.data.files import open_image
from train.look import features_of, sheet_of
from train.prediction import Pipeline, open_model
from train.show import Masks, Names, save_sheet, to_rgb
from train.show.sheet import make_palette

OWN = "its own"  # head of a run, and classifier of a model
TRIAL = 8  # classes of a head that has not been trained


@dataclass
class Answer:
    """What the page shows for a photograph.

    Attributes:
        note: one sentence.
        picture: the prediction over the photograph, with legend or scale, uint8 H W 3; None for a classification.
        labels: best classes and their probabilities; empty for maps.
        sheet: features and attention, uint8 H W 3.
    """

    note: str
    picture: np.ndarray | None = None
    labels: dict[str, float] = field(default_factory=dict)
    sheet: np.ndarray | None = None


def find_runs(folder: Path = Path("runs")) -> list[str]:
    """The runs with weights below a folder, newest first."""
    found = [path.parent for path in folder.glob("*/model.safetensors") if (path.parent / "config.yaml").is_file()]
    return [str(path) for path in sorted(found, key=lambda path: -path.stat().st_mtime)]


def answer(
    photo: str | Path, source: str, head: str = OWN, untrained: bool = False, at: tuple[float, float] | None = None
) -> Answer:
    """What the page shows. Raises ValueError, FileNotFoundError or OSError with a sentence.

    Args:
        photo: path of the image.
        source: run folder or model name.
        head: OWN, or a name of heads.HEADS to try on a model by name.
        untrained: leave a model by name with random weights.
        at: x and y of the place whose attention is shown, shares of width and height; None: the most salient.
    """
    if not source:
        raise ValueError("name a run folder or a model")
    if Path(source).is_dir():
        model, pipeline = run_of(source)
        if head != OWN:
            raise ValueError(f"{source} has a head of its own: choose {OWN!r}, or name a model")
        found = of_run(model, pipeline, photo)
        data = pipeline.config.data
        assert data.mean is not None and data.std is not None
        subject = Subject(source, model, data.size, tuple(data.mean), tuple(data.std), pipeline.names.classes)
    else:
        subject = subject_of(source, untrained)
        found = of_model(subject, photo, head)
    found.sheet = drawn_sheet(subject, Path(photo), at)
    return found


@lru_cache(maxsize=2)
def run_of(folder: str) -> tuple[nn.Module, Pipeline]:
    """A run's model and pipeline, kept for the next photograph."""
    return open_model(folder, device="cpu")


@lru_cache(maxsize=2)
def subject_of(name: str, untrained: bool) -> Subject:
    """A model by name, kept for the next photograph."""
    try:
        return open_subject(name, untrained=untrained)
    except (OSError, RuntimeError) as error:
        if untrained:
            raise
        raise ValueError(f"the released weights of {name} cannot be had ({one_line(error)}): tick random weights") from error


def of_run(model: nn.Module, pipeline: Pipeline, photo: str | Path) -> Answer:
    """The prediction of a run."""
    prediction = pipeline.predict(model, str(photo))
    if prediction.fields() == ["probabilities"]:
        best = dict(prediction.top(5))
        return Answer(f"{next(iter(best))}, {next(iter(best.values())):.0%}", labels=best)
    height, width = prediction.size
    return Answer(f"{', '.join(prediction.fields())} at {height}x{width}", np.asarray(prediction.overlay()))


@torch.no_grad()
def of_model(subject: Subject, photo: str | Path, head: str) -> Answer:
    """The classes of a model by name, or what a head that nobody trained draws from its features."""
    image = subject.images([Path(photo)])
    if head == OWN:
        with evaluation(subject.model):
            scores = subject.model(image)
        if scores.ndim != 2 or scores.shape[1] < 2:
            return Answer(f"{subject.name} has no classifier: below are its features and attention")
        best = scores.softmax(1)[0].topk(min(5, scores.shape[1]))
        labels = {class_name(int(i), scores.shape[1]): float(share) for share, i in zip(best.values, best.indices, strict=True)}
        return Answer(f"classes of {subject.name}", labels=labels)
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; {nearest(head, HEADS)}")
    torch.manual_seed(0)
    model = DensePredictor(features_of(subject.model), head, HEADS[head].only_channels or TRIAL).eval()
    output = model(image)
    photograph = to_rgb(image[0], subject.mean, subject.std)
    names = Names([f"group {i}" for i in range(TRIAL)], make_palette(TRIAL))
    centred = output - output.mean((2, 3), keepdim=True)  # one class alone would win everywhere
    ids = centred.argmax(1) if output.shape[1] > 1 else (centred[:, 0] > 0).long()
    note = f"the head {head} has random weights: these are groups of its outputs, not classes"
    return Answer(note, Masks(TRIAL).picture(photograph, ids, names))


def class_name(index: int, count: int) -> str:
    """A class of ImageNet by its name, any other by its number."""
    if count != 1000:
        return f"class {index}"
    return timm.data.ImageNetInfo().index_to_description(index).partition(",")[0]


def drawn_sheet(subject: Subject, photo: Path, at: tuple[float, float] | None) -> np.ndarray | None:
    """The sheet of `zoo look`; None for a model without feature maps."""
    try:
        features = features_of(subject.model)
    except (TypeError, ValueError):
        return None
    rows, title = sheet_of(subject, features, photo, at)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.png"
        save_sheet(path, rows, title, cell=3.0)
        return np.asarray(Image.open(path).convert("RGB"))


def one_line(error: Exception) -> str:
    """An error's message without line breaks, shortened."""
    return " ".join(str(error).split())[:300]


# -------------------------------------------------------------------------------------------------------------------- page


def require_gradio() -> Any:
    """Gradio. ImportError with the line that installs it."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the demo needs Gradio: pip install 'backbone-zoo[demo]'") from error
    return gradio


def page(runs: Sequence[str]) -> Any:
    """The page, a gradio.Blocks. runs: offered first; a model's name may be typed in their place."""
    gr = require_gradio()

    def show(photo: str | None, source: str, head: str, untrained: bool, at: Any = None) -> tuple[Any, ...]:
        if photo is None:
            raise gr.Error("drop an image first", print_exception=False)
        try:
            found = answer(photo, source, head, untrained, at)
        except (ValueError, OSError, ImportError, TypeError, AttributeError) as error:
            raise gr.Error(one_line(error), print_exception=False) from error
        return (
            found.note,
            gr.update(value=found.picture, visible=found.picture is not None),
            gr.update(value=found.labels or None, visible=bool(found.labels)),
            found.sheet,
        )

    def show_at(photo: str | None, source: str, head: str, untrained: bool, click: Any) -> tuple[Any, ...]:
        if photo is None:
            raise gr.Error("drop an image first", print_exception=False)
        width, height = open_image(Path(photo)).size  # upright, as the browser shows it
        x, y = click.index
        return show(photo, source, head, untrained, (min(x / width, 1.0), min(y / height, 1.0)))

    show_at.__annotations__["click"] = gr.SelectData  # by which Gradio knows what to pass
    with gr.Blocks(title="backbone-zoo") as blocks:
        gr.Markdown("## backbone-zoo\nDrop an image and press Show. A click on the image asks what that place attends to.")
        with gr.Row():
            with gr.Column():
                photo = gr.Image(type="filepath", sources=["upload", "clipboard"], label="image", elem_id="photo")
                source = gr.Dropdown(
                    list(runs),
                    value=runs[0] if runs else "",
                    label="run folder, or the name of a model",
                    allow_custom_value=True,
                    elem_id="source",
                )
                head = gr.Dropdown([OWN, *sorted(HEADS)], value=OWN, label="head", elem_id="head")
                untrained = gr.Checkbox(label="random weights (for a model by name)", elem_id="untrained")
                button = gr.Button("Show", variant="primary", elem_id="show")
            with gr.Column():
                note = gr.Textbox(label="result", interactive=False, elem_id="note")
                picture = gr.Image(label="prediction", interactive=False, visible=False, elem_id="picture")
                labels = gr.Label(label="classes", visible=False, elem_id="labels")
        sheet = gr.Image(label="features and attention", interactive=False, elem_id="sheet")
        inputs, outputs = [photo, source, head, untrained], [note, picture, labels, sheet]
        button.click(show, inputs, outputs)
        photo.upload(show, inputs, outputs)
        photo.select(show_at, inputs, outputs)
    return blocks


def demo(runs: Sequence[str] = (), host: str = "127.0.0.1", port: int = 7860, wait: bool = True) -> Any:
    """Serve the page; returns what was started, at once if not `wait`.

    Raises FileNotFoundError for a folder that is no run, ImportError without Gradio, ValueError for a port that is taken.

    Args:
        runs: run folders to offer; none: those below ./runs.
        host: address to listen at; 0.0.0.0 lets other machines in.
        port: of the page.
        wait: until the page is stopped.
    """
    gradio = require_gradio()
    for run in runs:
        configuration.load_run(run)
    blocks = page(list(runs) or find_runs())
    try:
        blocks.launch(server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise ValueError(f"port {port} of {host} cannot be used: choose another --port") from error
    print(f"http://{host}:{port} (gradio {gradio.__version__}); Ctrl-C ends it", flush=True)
    if wait:
        blocks.block_thread()
    return blocks
