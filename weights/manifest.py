"""The list of published checkpoints, weights/manifest.yaml, and what timm needs to know of it."""

import functools
from importlib import resources
from typing import Any

import yaml

# What timm's pretrained cfg has no field for.
OURS = ("by_hand", "file_name", "sha256", "published", "measured", "note", "classes_from_file")


@functools.cache
def read() -> dict:
    """The whole manifest: family -> {license, source, paper, defaults, models, files}."""
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a seventh of the time, at every import
    return yaml.load(resources.files("weights").joinpath("manifest.yaml").read_text(encoding="utf-8"), Loader=loader)


def default_cfgs(family: str) -> dict:
    """timm's pretrained configs of a family's models, by name; the first tag of a model is its default."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import generate_default_cfgs

    entry = read()[family]
    common = {"num_classes": 1000, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "license": entry["license"]}
    common |= {"origin_url": "https://" + entry["source"].split(" @ ")[0], "paper_ids": f"arXiv:{entry['paper']}"}
    cfgs: dict[str, Any] = {}
    for name, tags in entry["models"].items():
        for tag, fields in tags.items():
            fields = entry["defaults"] | fields
            cfg = common | {key: value for key, value in fields.items() if key not in OURS}
            if "by_hand" in fields:
                cfg["url"] = fields["by_hand"]  # so that timm lists the weights; weights.fetch knows that it is a page
            cfgs[f"{name}.{tag}"] = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
    return generate_default_cfgs(cfgs)


def find(name: str, tag: str | None = None) -> dict:
    """Everything the manifest says of checkpoint `name`.`tag` (first tag unless given) or of the further file `name`.

    Its family's fields are included. Empty if the manifest does not know the name or the tag.
    """
    for family, entry in read().items():
        shared = {"family": family, "license": entry["license"], "source": entry["source"], "paper": entry["paper"]}
        tags = entry["models"].get(name, {})
        if fields := tags.get(tag or next(iter(tags), None)):
            return shared | entry["defaults"] | fields | {"name": name, "tag": tag or next(iter(tags))}
        if tag is None and (fields := entry.get("files", {}).get(name)):
            return shared | fields | {"name": name, "tag": None}
    return {}


def checkpoints() -> list[dict]:
    """Every checkpoint of a model as `find` gives it, in the manifest's order."""
    return [find(name, tag) for entry in read().values() for name, tags in entry["models"].items() for tag in tags]


def files() -> list[dict]:
    """Every further published file (dense predictors, detectors, unnamed variants) as `find` gives it."""
    return [find(name) for entry in read().values() for name in entry.get("files", {})]
