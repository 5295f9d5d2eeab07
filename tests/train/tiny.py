"""The smallest run that exercises everything: a NAT of 13 thousand parameters on a few generated scenes."""

from train import config

VALUES = {
    "task": {"name": "segmentation", "num_classes": 6},
    "model": {
        "backbone": "nat_mini",
        "backbone_args": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "kernel_size": 3},
        "head": "linear",
    },
    "data": {"name": "scenes", "size": [32, 48], "eval_batch": 3, "args": {"count": 10, "val_count": 7, "size": [32, 48]}},
    "augment": {"hflip": 0.5, "color_jitter": 0.3},
    "optim": {"lr": 1e-3, "steps": 6, "global_batch": 4, "warmup_steps": 2, "ema_decay": 0.9, "clip_norm": 1.0},
    "run": {"log_every": 1, "eval_every": 3, "save_every": 2, "device": "cpu"},
}


def values(**changes):
    """VALUES with sections updated; a task with a name replaces theirs."""
    merged = {section: dict(content) for section, content in VALUES.items()}
    for section, content in changes.items():
        kept = {} if section == "task" and "name" in content else merged.get(section, {})
        merged[section] = {**kept, **content}
    if merged["task"]["name"] == "classification":
        merged["model"].pop("head", None)  # the backbone has its own
    return merged


def make(folder, **changes):
    """A resolved configuration whose run folder is `folder`."""
    resolved = config.resolve(values(**changes))
    resolved.run.dir = str(folder)
    return resolved


def task(**arguments):
    """The same run with another task; its arguments replace the segmentation's."""
    merged = values()
    merged["task"] = arguments
    return merged
