"""The list of published checkpoints, weights/manifest.yaml, and what timm needs to know of it."""

import functools
from importlib import resources

import yaml

OURS = ("sha256", "published", "measured", "note")  # what the manifest says beyond timm's pretrained cfg


@functools.cache
def read() -> dict:
    """The whole manifest: family -> {license, source, paper, defaults, models}."""
    return yaml.safe_load(resources.files("weights").joinpath("manifest.yaml").read_text())


def default_cfgs(family: str) -> dict:
    """timm's pretrained configs of a family's models, by name; the first tag of a model is its default."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import generate_default_cfgs

    entry = read()[family]
    common = {"num_classes": 1000, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "license": entry["license"]}
    common |= {"origin_url": "https://" + entry["source"].split(" @ ")[0], "paper_ids": f"arXiv:{entry['paper']}"} | entry[
        "defaults"
    ]
    cfgs = {}
    for name, tags in entry["models"].items():
        for tag, fields in tags.items():
            cfg = common | {key: value for key, value in fields.items() if key not in OURS}
            cfgs[f"{name}.{tag}"] = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
    return generate_default_cfgs(cfgs)
