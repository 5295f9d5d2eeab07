"""docs/models.md is what its command writes: every name has a row, and a few rows are made again."""

from pathlib import Path

import pytest

import backbones
from train import model_table

DOCS = Path(model_table.__file__).resolve().parent.parent / "docs"
LINES = (DOCS / "models.md").read_text(encoding="utf-8").splitlines()


def test_every_model_has_a_row_in_order():
    assert [text.split("`")[1] for text in LINES if text.startswith("| `")] == backbones.list_models()
    assert "\n".join(LINES).startswith(model_table.HEAD)
    assert model_table.line(model_table.COLUMNS) in LINES


@pytest.mark.parametrize("name", ["nat_mini", "pit_ti", "poolformer_s12_gn", "hvt_s_4", "fan_tiny_12_p16_224"])
def test_a_row_is_what_the_registry_says(name):
    free = model_table.free_sizes((DOCS / "export.md").read_text(encoding="utf-8"))
    assert model_table.line(list(model_table.row(name, free).values())) in LINES


def test_the_command_needs_its_neighbour(tmp_path, capsys):
    assert model_table.main([str(tmp_path / "models.md")]) == 2 and "export.md" in capsys.readouterr().err
    assert model_table.main([]) == 2 and "usage" in capsys.readouterr().err
