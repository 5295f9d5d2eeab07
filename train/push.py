"""`zoo push RUN user/name` or FOLDER: a run as others load it, weights, configuration and a card that says what they are.

What is written is a run folder again, without the paths of the machine that trained: `zoo predict` and `from_run` open it, and
`DensePredictor.from_pretrained("user/name")` fetches it. A classifier's folder is timm's too:
`timm.create_model("hf-hub:user/name", pretrained=True)`, or "local-dir:FOLDER".
"""

import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from train import config as configuration
from train.evaluation import open_run, protocol
from train.export import weights_of
from train.folder import versions
from train.tasks import Task
from train.tasks.classification import fixed_size
from weights import manifest

HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TAGS = {"classification": "image-classification", "segmentation": "image-segmentation", "depth": "depth-estimation"}
FILES = ("README.md", "config.json", "config.yaml", "model.safetensors", "predictions.png")


def push(run: str | Path, destination: str, license: str | None = None, private: bool = False, overwrite: bool = False) -> str:
    """Writes a run into a folder, or onto the Hugging Face hub; returns where it is and how it is opened.

    Raises FileNotFoundError if `run` is none, FileExistsError for a folder that holds something, ValueError for a model that
    these files could not rebuild or what the hub refuses, ImportError with the line to type without huggingface_hub.

    Args:
        run: run folder.
        destination: user/name on the hub; or a folder, which starts with . or / or lies in a folder that exists.
        license: of the weights, an identifier such as apache-2.0; None: the card says that it is not stated.
        private: a repository on the hub that only its owner sees.
        overwrite: replace what is there.
    """
    on_hub = HUB.fullmatch(destination) is not None and not Path(destination).parent.is_dir()
    folder = Path(destination)
    if not on_hub:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
            raise FileExistsError(f"{destination} exists; choose another name, or replace its files with --overwrite")
        if not folder.parent.is_dir():
            raise FileNotFoundError(f"{folder.parent} is no folder: make it first, or write user/name for the hub")
    api = hub_api() if on_hub else None
    with tempfile.TemporaryDirectory(dir=None if on_hub else folder.parent, prefix=".push-") as draft:
        opened = write(Path(run), Path(draft), destination if on_hub else str(folder), on_hub, license)
        if api is not None:
            try:
                api.create_repo(destination, private=private, exist_ok=overwrite)
                api.upload_folder(repo_id=destination, folder_path=draft, commit_message="backbone-zoo: a trained model")
            except Exception as error:  # the hub's client has many kinds
                raise ValueError(f"the hub refuses {destination}: {str(error).strip().splitlines()[0]}") from error
        else:
            folder.mkdir(exist_ok=True)
            for path in sorted(Path(draft).iterdir()):
                shutil.move(path, folder / path.name)
    return f"{'https://huggingface.co/' if on_hub else ''}{destination}: {opened}"


def hub_api() -> Any:
    """The client of the hub."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError('the hub needs huggingface_hub: pip install "backbone-zoo[hub]"') from error
    return HfApi()


def write(run: Path, folder: Path, name: str, on_hub: bool, license: str | None) -> str:
    """Writes the files of FILES into an empty folder; returns the line that opens the model.

    Args:
        run: run folder.
        folder: empty.
        name: where it will be.
        on_hub: whether that is on the hub.
        license: of the weights.
    """
    config, task, model, names = open_run(run)
    kind = config.task["name"]
    if kind == "classification" and config.model.edits:
        edit = config.model.edits[0]["name"]
        raise ValueError(f"{run}: the backbone is edited ({edit}), which timm cannot rebuild; push a run without model.edits")
    if ":" in config.model.backbone:
        raise ValueError(f"{run}: {config.model.backbone} is a file of yours, which others do not have")
    metrics = recorded(run)
    values = configuration.as_dict(config)
    values["run"]["dir"] = None
    values["model"] |= {"checkpoint": None, "pretrained": False}
    if values["data"]["root"] is not None:
        values["data"]["root"] = f"data/{config.data.name}"
    about = {"names": json.dumps(dataclasses.asdict(names)), "metrics": json.dumps(metrics), "versions": json.dumps(versions())}
    save_file(dict(weights_of(model)), folder / "model.safetensors", {"format": "pt", **about})
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    if kind == "classification":
        line = f'timm.create_model("{"hf-hub" if on_hub else "local-dir"}:{name}", pretrained=True)'
        (folder / "config.json").write_text(json.dumps(timm_config(config, model, names.classes), indent=1), encoding="utf-8")
    else:
        line = f'{type(model).__name__}.from_pretrained("{name}")'
        (folder / "config.json").write_text(json.dumps({"library_name": "backbone-zoo", "config": values}, indent=1))
    picture = run / "predictions.png"
    if picture.is_file():
        shutil.copyfile(picture, folder / "predictions.png")
    text = card(config, task, model, names.classes, metrics, line, license, picture.is_file())
    (folder / "README.md").write_text(text, encoding="utf-8")
    return line


def recorded(run: Path) -> dict[str, Any]:
    """The metrics of a run's best weights, from its summary; empty if it has none."""
    try:
        return dict(json.loads((run / "summary.json").read_text(encoding="utf-8"))["best"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def timm_config(config: Any, model: Any, classes: list[str] | None) -> dict[str, Any]:
    """What timm reads from a folder or from the hub to build a classifier and its transform.

    Args:
        config: of the run.
        model: a timm model.
        classes: their names.
    """
    data = config.data
    args = dict(config.model.backbone_args)
    found: dict[str, Any] = {
        "architecture": config.model.backbone.partition(".")[0],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {**args, **({"in_chans": config.model.in_chans} if config.model.in_chans != 3 else {})},
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [config.model.in_chans, *data.size],
            "mean": list(data.mean),
            "std": list(data.std),
            "crop_pct": config.augment.eval_crop,
            "interpolation": config.augment.interpolation,
            "first_conv": model.pretrained_cfg.get("first_conv"),
            "classifier": model.pretrained_cfg.get("classifier"),
        },
    }
    if fixed_size(config.model.backbone):
        found["model_args"].setdefault("img_size", list(config.model.img_size or data.size))
    return found | ({"label_names": classes} if classes else {})


def card(
    config: Any,
    task: Task,
    model: Any,
    classes: list[str] | None,
    metrics: dict[str, Any],
    line: str,
    license: str | None,
    picture: bool,
) -> str:
    """The model card, README.md of the folder: only what the run knows.

    Args:
        config: of the run.
        task: says how its numbers were made.
        model: for the number of parameters.
        classes: their names.
        metrics: of the weights; may be empty.
        line: opens the model.
        license: of the weights.
        picture: whether predictions.png is beside it.
    """
    backbone, kind = config.model.backbone, config.task["name"]
    entry = manifest.find(*backbone.split(".", 1)) if "." in backbone else manifest.find(backbone)
    head: dict[str, Any] = {"tags": ["backbone-zoo", *(["timm"] if kind == "classification" else [])]}
    if kind in TAGS:
        head["pipeline_tag"] = TAGS[kind]
    if kind == "classification":
        head["library_name"] = "timm"
    if license:
        head["license"] = license
    under = f" under the head `{config.model.head}`" if task.takes_heads or kind in ("segmentation", "depth") else ""
    count = sum(p.numel() for p in model.parameters()) / 1e6
    loads = ["import timm", "import backbones", "", f"model = {line}.eval()"] if kind == "classification" else [
        f"from heads import {type(model).__name__}", "", f"model = {line}", 'model.predict("photo.jpg").save("out")',
    ]  # fmt: skip
    start = "released weights" if config.model.pretrained else "random weights"
    optim, size = config.optim, f"{config.data.size[0]} x {config.data.size[1]}"
    length = f"{optim.steps} steps" if optim.steps else f"{optim.epochs} passes"
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        f"# {kind.capitalize()} with {backbone}",
        "",
        f"`{backbone}`{under}, {count:.1f} million parameters, trained on {config.data.name} with backbone-zoo.",
        "",
        "```python",
        *loads,
        "```",
        "",
    ]
    if picture:
        lines += ["![Images, truth and predictions](predictions.png)", ""]
    lines += ["## Numbers", ""]
    if metrics:
        lines += ["| metric | value |", "|---|---|", *(f"| {key} | {value:.4f} |" for key, value in metrics.items()), ""]
        lines += [f"On the validation split of {config.data.name}. {protocol(task, config)}.", ""]
    else:
        lines += ["Not evaluated.", ""]
    lines += [
        "## Training",
        "",
        f"From {start}, {length} of {optim.global_batch} images at {size}; `config.yaml` is the whole run:",
        "",
        "```bash",
        "zoo train config.yaml --data.root=PATH" if config.data.root is not None else "zoo train config.yaml",
        "```",
        "",
        f"Made with {', '.join(f'{name} {version}' for name, version in versions().items())}.",
        "",
    ]
    if classes:
        lines += [f"Classes: {', '.join(classes[:200])}{' ...' if len(classes) > 200 else ''}.", ""]
    given = f"The weights are under {license}." if license else "The licence of these weights is not stated; ask their author."
    of_start = f" Those they started from: {entry['license']}." if entry and config.model.pretrained else ""
    lines += ["## Licence", "", f"{given}{of_start}", "", "## Citation", ""]
    paper = f"the backbone's paper, https://arxiv.org/abs/{entry['paper']}, and " if entry else "the backbone's paper and "
    lines += [f"Please cite {paper}backbone-zoo (CITATION.cff of the package).", ""]
    return "\n".join(lines)
