"""The table of all models, docs/models.md, made from the registry: `python -m train.model_table docs/models.md`."""

import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import backbones
import weights
from backbones.ops import neighborhood
from weights import manifest

COLUMNS = (
    "model",
    "parameters",
    "GMACs",
    "at",
    "maps: channels/stride",
    "smallest",
    "published",
    "licence",
    "formats",
    "export",
)
HEAD = """# Models

Made by `python -m train.model_table docs/models.md`. Parameters in millions and multiply-adds for one image of the size beside
them, counted by torch without running; channels and strides of the maps that `features_only=True` gives; the smallest image
side; the score that the authors published, with the tag of the weights; the licence of the weights; whose files load besides
ours (`zoo convert` writes the authors' names again); and the sizes for which one exported program serves, see
[export.md](export.md).
"""


def row(name: str, free: Sequence[str] = ()) -> dict[str, str]:
    """What the table says of a model; free: beginnings of the names that export with free height and width."""
    model: Any = timm.create_model(name, device="meta").eval().requires_grad_(False)
    channels, *size = model.pretrained_cfg["input_size"]
    with torch.no_grad(), neighborhood.using("reference"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, channels, *size, device="meta"))
    maps = "-"
    if not getattr(model, "no_maps", None):
        info: Any = timm.create_model(name, features_only=True, device="meta").feature_info
        maps = " ".join(f"{dim}/{stride}" for dim, stride in zip(info.channels(), info.reduction()))
    entries = [entry for entry in manifest.checkpoints() if entry["name"] == name]
    scores = [f"{entry['tag']}: {value}" for entry in entries for value in list((entry.get("published") or {}).values())[:1]]
    converter: Any = weights.convert.converter(model)
    formats = re.findall(r'"(official|timm|huggingface)"', inspect.getsource(converter.source_format))
    return dict(
        zip(
            COLUMNS,
            (
                f"`{name}`",
                f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
                f"{counter.get_total_flops() / 2e9:.2f}",
                "x".join(map(str, size)),
                maps,
                str(getattr(model, "min_size", "-")),
                ", ".join(scores) or "-",
                ", ".join(sorted({str(entry["license"]) for entry in entries})) or "-",
                ", ".join({"official": "authors'", "huggingface": "Hugging Face"}.get(f, f) for f in dict.fromkeys(formats)),
                "any size" if any(name.startswith(start) for start in free) else "one size",
            ),
        )
    )


def free_sizes(export: str) -> list[str]:
    """Beginnings of the names that docs/export.md lists with free height and width."""
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in export.splitlines() if line.startswith("| ")]
    return [name for names, _, size in rows if size.startswith("free") for name in names.split(", ")]


def line(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def text(names: Sequence[str], free: Sequence[str]) -> str:
    """The whole page."""
    lines = [line(COLUMNS), line(["---"] * len(COLUMNS)), *(line(list(row(name, free).values())) for name in names)]
    return f"{HEAD}\n" + "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Writes the page into the file that the only argument names; export.md lies beside it."""
    if len(arguments) != 1:
        print("usage: python -m train.model_table docs/models.md", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    if not (path.parent / "export.md").is_file():
        print(f"train.model_table: {path.parent} has no export.md, which says what exports at any size", file=sys.stderr)
        return 2
    free = free_sizes((path.parent / "export.md").read_text(encoding="utf-8"))
    path.write_text(text(backbones.list_models(), free), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
