"""Pages made from the program: `python -m train.reference docs` writes commands.md, configuration.md and recipes.md there.

It also fills the tables of docs/families from docs/models.md, which `train.model_table` makes.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from typing import Any

from backbones.edits import EDITS
from heads import HEADS
from train import recipes
from train.data import DATASETS
from train.schema import SECTIONS
from train.tasks import TASKS

MADE = "Made by `python -m train.reference docs`; do not edit."
OWN = ("root", "split", "targets", "transform")  # of every data set; a configuration has them in other places

# One or more lines for each command: a test parses them.
EXAMPLES = {
    "list": ("zoo list 'dinat_*' --pretrained", "zoo list --license mit", "zoo list --configs ade20k"),
    "info": ("zoo info litv2_s --size 512 512", "zoo info resnet50 --heads"),
    "train": (
        "zoo train quickstart",
        "zoo train camvid/upernet_nat --data.root=PATH --optim.steps=500",
        "zoo train mine.yaml --run.dir=runs/second --resume",
    ),
    "eval": ("zoo eval runs/quickstart", "zoo eval runs/mine --infer.flip=true --json"),
    "predict": (
        "zoo predict runs/quickstart photos/ --out predictions --sheet",
        "zoo predict model.onnx photo.jpg --out predictions",
    ),
    "config": (
        "zoo config quickstart",
        "zoo config --new segmentation my_data > my.yaml",
        "zoo config imagenet/swin_t --optim.epochs=100 --json",
    ),
    "data-check": ("zoo data-check my.yaml --out checked", "zoo data-check ade20k/upernet_swin_t --data.root=PATH --count 200"),
    "convert": (
        "zoo convert swin_t swin_tiny_patch4_window7_224.pth swin_t.safetensors",
        "zoo convert nat_mini mine.safetensors theirs.safetensors --naming official",
    ),
    "export": (
        "zoo export runs/quickstart model.onnx --dynamic batch,hw",
        "zoo export nat_mini nat_mini.pt2 --pretrained --size 384 384",
    ),
    "push": ("zoo push runs/mine ./my-model --license apache-2.0",),
    "analyze": ("zoo analyze vit_small_patch16_224 photos/ --out analysed --what attention spectrum",),
    "explain": ("zoo explain runs/mine photo.jpg --out explained --class dog",),
    "look": ("zoo look runs/quickstart photo.jpg --out seen --at 0.4,0.6",),
    "demo": ("zoo demo runs/quickstart --port 7861",),
    "bench": (
        "zoo bench nat_mini swin_t --batches 1 8",
        "zoo bench swin_t swin_t@fuse swin_t@compile --inference",
        "zoo bench ops",
    ),
    "plan": ("zoo plan imagenet/nat_base --gpus 8 --gpu a100",),
    "doctor": ("zoo doctor", "zoo doctor dinat_mini --size 512 512"),
    "completion": ("zoo completion bash > zoo.bash",),
}

TASK_TEXT = """`task.name` is one of these, and the other keys of `task` are its arguments. `num_classes` may be
left out where the data say it: a data set with classes of its own, or `data.args.classes`."""
COMMANDS_TEXT = """Every command has `--help`, and `--debug`, which shows the traceback of an error. A mistake is one
sentence on standard error and exit code 2. `--section.key=value` sets a key of the
[configuration](configuration.md) for that call. `zoo --version` says the versions of the zoo, torch
and timm."""
CONFIGURATION_TEXT = """A configuration is one YAML file; [recipes](recipes.md) are those that are shipped. `zoo config
NAME` prints one with its defaults filled in. On a command line a key is `--section.key=value`; the
value is YAML. An unknown key is an error with the nearest name."""
DATA_TEXT = "`data.name` is one of these, and `data.args` its arguments. [Your own data](data.md) shows the folders."
HEADS_TEXT = "`model.head` is one of these, and `model.head_args` its arguments. [Every head](heads.md) says what they are for."
EDITS_TEXT = "An entry of `model.edits` has the `name` of one of these and its arguments: [Edits](edits.md)."
ARGUMENTS = (
    ("data.args", "dataargs", "Arguments of each data set"),
    ("model.head_args", "modelhead_args", "Arguments of each head"),
    ("model.edits", "modeledits", "Arguments of each edit"),
)
RECIPES_TEXT = """{runs} configurations in {files} files of `configs/`. `zoo config NAME` prints one, `zoo train NAME
--data.root=PATH` runs it; the file's head says how its authors' hardware is matched. *Published* is
the authors' number, *measured here* is ours, and "not yet run" means that nobody has run this
recipe to its end here."""
ABOUT = {"source": "Source", "published": "Published", "measured": "Measured here", "hardware": "Hardware"}


# ---------------------------------------------------------------------------------------------------------------- Markdown


def plain(text: object) -> str:
    """Text that Markdown shows as it is; what stands between backticks stays code."""
    parts = str(text).split("`")
    escaped = [re.sub(r"([*|]|(?<!\w)_)", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    parts[::2] = escaped
    return "`".join(parts)


def cell(text: object) -> str:
    """Text as it may stand in a table of Markdown."""
    return " ".join(plain(text).split())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(map(cell, row))} |" for row in (head, ["---"] * len(head), *rows)]


def code(value: object) -> str:
    """A value as code; null for None, true and false as YAML has them."""
    shown = {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    if isinstance(value, tuple):
        value = list(value)
    text = shown or str(value).replace("'", "") or '""'
    return f"`{text}`"


# ---------------------------------------------------------------------------------------------------------------- commands


def word(action: argparse.Action) -> str:
    """How a positional argument stands in a command line."""
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices is not None:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    return {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} ..."}.get(str(action.nargs), name)


def option(action: argparse.Action) -> str:
    """An option and what follows it."""
    if action.nargs == 0:
        return ", ".join(action.option_strings)
    if isinstance(action.metavar, tuple):
        value = " ".join(action.metavar)
    elif action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        value = str(action.metavar or action.dest.upper())
    return f"{', '.join(action.option_strings)} {value}{' ...' if action.nargs == '+' else ''}"


def meaning(action: argparse.Action) -> str:
    """The help of an argument, with its default where the help does not say it."""
    text = action.help or ""
    plain = action.default in (None, False, argparse.SUPPRESS, "") or action.default == []
    if plain or "default" in text or action.nargs == 0:
        return text
    value = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
    return f"{text}; default: {value}" if text else f"default: {value}"


def command(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """The lines of one command."""
    actions = [action for action in parser._actions if action.dest not in ("help", "debug")]
    positional = [action for action in actions if not action.option_strings]
    options = [action for action in actions if action.option_strings]
    required = [option(action) for action in options if action.required]
    usage = ["zoo", name, *map(word, positional), *required]
    usage += ["[options]"] if len(required) < len(options) else []
    usage += ["[--section.key=value ...]"] if parser.get_default("takes_overrides") else []
    lines = [f"## zoo {name}", "", str(parser.description), "", "```text", " ".join(usage), "```", ""]
    rows = [(f"`{word(action)}`", meaning(action)) for action in positional]
    rows += [(f"`{option(action)}`", meaning(action) + (" (required)" if action.required else "")) for action in options]
    lines += table(("argument", "meaning"), rows)
    if parser.epilog:
        lines += ["", "```text", parser.epilog.strip(), "```"]
    return [*lines, "", "```bash", *EXAMPLES[name], "```", ""]


def commands_page() -> str:
    """docs/commands.md."""
    from train.cli import build_parser

    parser = build_parser()
    subs: Any = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    lines = ["# Commands", "", MADE, "", COMMANDS_TEXT, ""]
    rows = [(f"[zoo {name}](#zoo-{name})", sub.description) for name, sub in subs.choices.items()]
    lines += [*table(("command", "what it does"), rows), ""]
    for name, sub in subs.choices.items():
        lines += command(name, sub)
    return "\n".join(lines).rstrip() + "\n"


# ----------------------------------------------------------------------------------------------------------- configuration


def described(text: str | None) -> dict[str, str]:
    """The names and meanings that the Args: and Attributes: lists of a docstring have."""
    found: dict[str, str] = {}
    for part in re.split(r"^(?:Args|Attributes):\n", inspect.cleandoc(text or ""), flags=re.MULTILINE)[1:]:
        block = re.match(r"(?:(?: {4}.*)?\n)*(?: {4}.*)?", part)
        for entry in re.findall(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", block[0] if block else "", re.MULTILINE):
            found |= dict.fromkeys(entry[0].split(", "), " ".join(entry[1].split()))
    return found


def lead(text: str | None) -> str:
    """What a docstring says before its lists, without its errors: those are sentences that a user reads when they happen."""
    paragraphs = re.split(r"^(?:Args|Attributes):\n", inspect.cleandoc(text or ""), flags=re.MULTILINE)[0].strip().split("\n\n")
    kept = [re.sub(r"\s*\bRaises [A-Z].*", "", paragraph, flags=re.DOTALL) for paragraph in paragraphs]
    return "\n\n".join(filter(None, kept))


def meanings(part: Callable) -> dict[str, str]:
    """The meanings of the arguments of a function, or of a class and what it takes them from."""
    found: dict[str, str] = {}
    for owner in reversed(inspect.getmro(part)) if isinstance(part, type) else [part]:
        methods: list[Callable] = [vars(owner)[name] for name in ("__init__", "find", "describe") if name in vars(owner)]
        for text in (owner.__doc__, *(method.__doc__ for method in methods)):
            known = described(text)  # a child that says "of `Parent`" has nothing to add to the parent's own words
            found |= {name: says for name, says in known.items() if name not in found or not re.search(r"\bof `\w+`\.$", says)}
    return found


def arguments(cls: Callable, skip: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """(name, default, meaning) of what a class or a function takes."""
    known = meanings(cls)
    return [
        (f"`{name}`", "required" if p.default is p.empty else code(p.default), known.get(name, ""))
        for name, p in inspect.signature(cls).parameters.items()
        if name not in skip and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]


def sections() -> list[str]:
    """The tables of the fixed sections."""
    lines = []
    for name, cls in SECTIONS.items():
        known = described(cls.__doc__)
        rows = []
        for key in fields(cls):
            factory: Any = key.default_factory
            made = key.default if key.default is not MISSING else factory()
            rows.append((f"`{name}.{key.name}`", code(made), known[key.name]))
        lines += [f"## {name}", "", lead(cls.__doc__), "", *table(("key", "default", "meaning"), rows), ""]
    return lines


def named(title: str, classes: Mapping[str, Any], text: str, skip: Sequence[str] = ()) -> list[str]:
    """A chapter with a table for each class of a table of names.

    Args:
        title: of the chapter.
        classes: by the names that a configuration has.
        text: under the title.
        skip: arguments that a configuration does not give there.
    """
    lines = [f"## {title}", "", text, ""]
    for name in classes:
        cls = classes[name]
        lines += [f"### {name}", "", plain(lead(cls.__doc__)), ""]
        if rows := arguments(cls, skip):
            lines += [*table(("argument", "default", "meaning"), rows), ""]
    return lines


def configuration_page() -> str:
    """docs/configuration.md."""
    lines = ["# Keys of a configuration", "", MADE, "", CONFIGURATION_TEXT, ""]
    rows = [("[task](#task)", "What is trained: losses, metric, and the number of classes or the range of depth")]
    rows += [(f"[{name}](#{name})", lead(cls.__doc__).partition(".")[0]) for name, cls in SECTIONS.items()]
    rows += [(f"[{name}](#{slug})", text) for name, slug, text in ARGUMENTS]
    lines += [*table(("section", "what it says"), rows), ""]
    lines += named("task", TASKS, TASK_TEXT)
    lines += sections()
    lines += named("data.args", DATASETS, DATA_TEXT, OWN)
    lines += named("model.head_args", HEADS, HEADS_TEXT, ("channels", "out_channels"))
    lines += named("model.edits", EDITS, EDITS_TEXT, ("model",))
    return "\n".join(lines).rstrip() + "\n"


# ----------------------------------------------------------------------------------------------------------------- recipes


def about_file(file: str) -> str:
    """The first sentence of a configuration file's head."""
    content = resources.files("configs").joinpath(*file.split("/")).read_text(encoding="utf-8")
    head = re.match(r"(?:#.*\n)*", content)
    text = " ".join(line.lstrip("# ").strip() for line in (head[0] if head else "").splitlines())
    return re.split(r"(?<=\.)\s|\s(?=torchrun|zoo train)", text)[0]


def recipes_page() -> str:
    """docs/recipes.md."""
    names = recipes.shipped()
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(recipes.find(name).file, []).append(name)
    lines = ["# Recipes", "", MADE, "", RECIPES_TEXT.format(runs=len(names), files=len(files)), ""]
    for file in sorted(files, key=lambda file: ("/" in file, not file.startswith("quickstart"), file)):
        runs = files[file]
        facts = {key: [recipes.about(name).get(key, "") for name in runs] for key in ABOUT}
        lines += [f"## {file}", "", plain(about_file(file)), ""]
        shared = [key for key, values in facts.items() if len(set(values)) == 1]
        lines += [f"- {ABOUT[key]}: {facts[key][0]}" for key in shared if facts[key][0]]
        apart = [key for key in ABOUT if key not in shared]
        if len(runs) == 1:
            lines += [f"- Configuration: `{runs[0]}`", ""]
            continue
        rows = [(f"`{name}`", *(facts[key][i] for key in apart)) for i, name in enumerate(runs)]
        lines += ["", *table(("configuration", *(ABOUT[key] for key in apart)), rows), ""]
    return "\n".join(lines).rstrip() + "\n"


# ---------------------------------------------------------------------------------------------------------------- families

MODELS = ("model", "parameters (M)", "GMACs", "maps: channels/stride", "published")


def rows_of(models: str) -> dict[str, list[str]]:
    """The rows of docs/models.md by name, cut to the columns of a family's page."""
    found = {}
    for line in models.splitlines():
        if line.startswith("| `"):
            name, parameters, macs, size, maps, _, published, *_ = (part.strip() for part in line.strip("|").split("|"))
            found[name.strip("`")] = [name, parameters, f"{macs} at {size}", maps, published]
    return found


def family_page(text: str, models: str) -> str:
    """The page of a family with the rows of its table as docs/models.md has them now; the page says which names they are."""
    rows, lines, inside = rows_of(models), [], False
    for line in text.splitlines():
        inside = line == table(MODELS, [])[0] or (inside and line.startswith("|"))
        name = line.split("`")[1] if inside and line.startswith("| `") else ""
        lines.append(f"| {' | '.join(rows[name])} |" if name else line)
    return "\n".join(lines) + "\n"


PAGES = {"commands.md": commands_page, "configuration.md": configuration_page, "recipes.md": recipes_page}


def main(given: Sequence[str]) -> int:
    """Writes the pages into the folder that the only argument names, which holds models.md."""
    if len(given) != 1 or not (Path(given[0]) / "models.md").is_file():
        print("usage: python -m train.reference docs", file=sys.stderr)
        return 2
    for name, page in PAGES.items():
        (Path(given[0]) / name).write_text(page(), encoding="utf-8")
    models = (Path(given[0]) / "models.md").read_text(encoding="utf-8")
    for path in sorted((Path(given[0]) / "families").glob("*.md")):
        path.write_text(family_page(path.read_text(encoding="utf-8"), models), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
