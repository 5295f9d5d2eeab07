"""What `zoo list` and `zoo info` show of a model."""

import fnmatch
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import backbones
from backbones.ops import neighborhood
from train import recipes
from train.checks import nearest
from train.plugins import built_at, require_model
from train.plugins import models as foreign_models
from weights import manifest


def models(pattern: str = "", license: str | None = None, pretrained: bool = False) -> list[dict[str, str]]:
    """One row per model of the zoo and its released weights: name, tag, license, input, published score, where from.

    pattern: wildcards, or a part of the name; license: a part of the licence's name, e.g. "mit"; pretrained: only models that
    have weights. Models without weights have an empty tag.
    """
    names = [name for name in [*backbones.list_models(), *foreign_models()] if matches(name, pattern)]
    known: dict[str, list[dict]] = {}
    for entry in manifest.checkpoints():
        known.setdefault(entry["name"], []).append(entry)
    rows = []
    for name in names:
        for entry in known.get(name, [{}]):
            if pretrained and not entry:
                continue
            if license is not None and license.lower() not in str(entry.get("license", "")).lower():
                continue
            rows.append(
                {
                    "model": name,
                    "weights": entry.get("tag", ""),
                    "license": str(entry.get("license", "")),
                    "input": "x".join(str(side) for side in entry.get("input_size", ())[1:]),
                    "published": ", ".join(f"{key} {value}" for key, value in (entry.get("published") or {}).items()),
                    "from": "by hand" if "by_hand" in entry else ("download" if entry.get("url") else ""),
                }
            )
    return rows


def configurations(pattern: str = "") -> list[dict[str, str]]:
    """One row per shipped configuration whose name matches: name, published and measured score, hardware, source."""
    return [
        {
            "configuration": name,
            **{key: recipes.about(name).get(key, "") for key in ("published", "measured", "hardware", "source")},
        }
        for name in recipes.shipped()
        if matches(name, pattern)
    ]


def nothing_found(pattern: str, license: str | None, configs: bool) -> str:
    """Why `models` or `configurations` gave no row, with the nearest names."""
    names = recipes.shipped() if configs else [*backbones.list_models(), *foreign_models()]
    licenses = sorted({str(entry.get("license", "")) for entry in manifest.checkpoints()} - {""})
    if license is not None and not configs and not any(license.lower() in known.lower() for known in licenses):
        return f"no weights under the licence {license!r}; {nearest(license, licenses)}"
    if not any(matches(name, pattern) for name in names):
        return f"no {'configuration' if configs else 'model'} matches {pattern!r}; {nearest(pattern.strip('*'), names)}"
    return "no model has all of that: leave out the filter, --license or --pretrained"


def matches(name: str, pattern: str) -> bool:
    """Whether a name has these wildcards, or this part; every name has the empty one."""
    return fnmatch.fnmatch(name, pattern or "*") or pattern in name


def info(name: str, size: tuple[int, int] | None = None, args: dict[str, Any] | None = None) -> dict[str, Any]:
    """Parameters (millions), multiply-adds (GMACs, one image), feature maps and licence of any timm model, ours included.

    size: (H, W) to count at; the model's own by default. Raises ValueError with the nearest name for an unknown one, and for a
    size that the model cannot take.
    """
    require_model("", name)
    model: Any = built_at(name, size, **(args or {})).eval()
    cfg = model.pretrained_cfg
    size = size or tuple(cfg["input_size"][1:])
    image = torch.zeros(1, cfg["input_size"][0], *size)
    try:
        with torch.no_grad(), neighborhood.using("reference"), FlopCounterMode(display=False) as counter:
            model(image)
    except (AssertionError, RuntimeError, ValueError) as error:  # whatever an architecture says of a size
        raise ValueError(f"{name} cannot take images of {size[0]} x {size[1]}: {' '.join(str(error).split())[:200]}") from error
    result = {
        "model": name,
        "parameters (M)": round(sum(p.numel() for p in model.parameters()) / 1e6, 3),
        f"GMACs at {size[0]}x{size[1]}": round(counter.get_total_flops() / 2e9, 3),
        "classes": model.num_classes,
        "smallest image side": getattr(model, "min_size", "not stated"),
    }
    try:
        features: Any = built_at(name, size, features_only=True, feature_cls="getter", **(args or {})).eval()
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        result["feature maps"] = f"none ({' '.join(str(error).split())[:80]})"
    else:
        with torch.no_grad():
            maps = features(image)
        described = zip(features.feature_info.channels(), features.feature_info.reduction(), maps, strict=True)
        result["feature maps"] = "; ".join(
            f"{channels} channels, stride {stride}, {m.shape[-2]}x{m.shape[-1]}" for channels, stride, m in described
        )
    entry = manifest.find(*name.split(".", 1)) if "." in name else manifest.find(name)
    for key in ("tag", "license", "source", "paper", "published", "measured", "note"):
        if entry.get(key):
            result[key] = entry[key]
    if not entry:
        result |= {key: cfg[key] for key in ("license", "origin_url", "tag") if cfg.get(key)}
    result["mean, std"] = f"{tuple(cfg['mean'])}, {tuple(cfg['std'])}"
    return result
