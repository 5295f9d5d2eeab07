"""Configuration files by name: the recipes that are shipped, and files of a user.

A file holds the sections of train.schema and, beside them, what is known of the run: `source`, `published`, `measured` and
`hardware`. A file for several models has a table of `variants`: name -> the keys that differ, written with dots. A shipped
variant is a name of its folder: imagenet/nat.yaml has imagenet/nat_tiny; files above the folders serve several data sets and
spell it out: depth_dpt.yaml has kitti/dpt_vit_base. Rows that share keys do so by YAML's own means (&name, <<: *name). One of
a user's file is FILE.yaml:NAME.
"""

import copy
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from train.checks import nearest
from train.reading import parse, read_text, set_key
from train.schema import SECTIONS

ABOUT = ("source", "published", "measured", "hardware")


@dataclass(frozen=True)
class Recipe:
    """One run of a file.

    Attributes:
        values: the sections, variant applied.
        about: what is known of it, keys of ABOUT.
        file: that holds it.
    """

    values: dict[str, Any]
    about: dict[str, str]
    file: str


def shipped() -> list[str]:
    """Names of the configurations in the package: quickstart, imagenet/nat_mini, ..."""
    return sorted(_package())


def find(name: str) -> Recipe:
    """A shipped configuration. KeyError for a name that is none."""
    return _package()[name]


def about(name: str) -> dict[str, str]:
    """Source, published and measured score, and hardware of a shipped configuration, as far as its file has them."""
    return dict(find(name).about)


def read(name: str) -> tuple[str, dict[str, Any]]:
    """(name of the run, sections) of a shipped configuration, of a YAML file, or of one variant in it, FILE.yaml:VARIANT.

    Raises FileNotFoundError with the nearest shipped name, ValueError if the file is no mapping of sections or has variants and
    none is chosen.
    """
    file, colon, variant = name.rpartition(":")
    if not colon or Path(file).suffix not in (".yaml", ".yml"):
        file, variant = name, ""
    path = Path(file)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise FileNotFoundError(f"no configuration file {file}")
        found = variants_of(parse(read_text(path), file), file)
        if variant not in found:
            names = [key for key in found if key]
            if not names:
                raise ValueError(f"{file} has no variants: leave out ':{variant}'")
            if variant:
                raise ValueError(f"{file} has no variant {variant!r}; {nearest(variant, names)}")
            raise ValueError(f"{file} has several variants; choose one, e.g. {file}:{names[0]} (of {', '.join(names)})")
        return "_".join(filter(None, (path.stem, variant))), found[variant].values
    if name in _package():
        return name, copy.deepcopy(_package()[name].values)
    inside = [key for key, recipe in _package().items() if recipe.file == f"{name}.yaml"]
    if inside:
        raise FileNotFoundError(f"{name} is a table of variants; choose one: {', '.join(inside)}")
    raise FileNotFoundError(f"no configuration {name!r} is shipped, and there is no such file; {nearest(name, shipped())}")


def variants_of(content: Any, file: str) -> dict[str, Recipe]:
    """The runs of a file's content by variant, or one under "" if it has no table. Raises ValueError for another form."""
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected sections such as 'task:' and 'data:', got {type(content).__name__}")
    base = {key: value for key, value in content.items() if key not in (*ABOUT, "variants")}
    known = {key: str(content[key]) for key in ABOUT if content.get(key) is not None}
    if "variants" not in content:
        return {"": Recipe(base, known, file)}
    table = content["variants"]
    if not isinstance(table, dict) or not table or not all(isinstance(row, dict) for row in table.values()):
        raise ValueError(f"{file}: variants must be a table of names and the keys that differ, got {str(table)[:80]}")
    found = {}
    for variant, row in table.items():
        values, own = copy.deepcopy(base), dict(known)
        for key, value in row.items():
            where = f"{file}: variants.{variant}"
            if key in ABOUT:
                own[key] = str(value)
            elif str(key).partition(".")[0] in (*SECTIONS, "task") and "." in str(key):
                set_key(values, key, copy.deepcopy(value))
            else:
                raise ValueError(f"{where}: {key!r} is no key of a section (section.key) and not one of {', '.join(ABOUT)}")
        found[str(variant)] = Recipe(values, own, file)
    return found


@cache
def _package() -> dict[str, Recipe]:
    """Every shipped configuration by name."""
    found: dict[str, Recipe] = {}
    with resources.as_file(resources.files("configs")) as root:
        for path in sorted(root.rglob("*.yaml")):
            file = path.relative_to(root)
            for variant, recipe in variants_of(parse(read_text(path), file.as_posix()), file.as_posix()).items():
                name = (file.parent / variant if variant else file.with_suffix("")).as_posix()
                if name in found:
                    raise ValueError(f"configs: {name} is in {found[name].file} and in {recipe.file}")
                found[name] = recipe
    return found
