"""YAML that users write, read without surprises: nothing is executed, no key counts twice, nothing grows without bound."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

CHARACTERS = 500_000  # the largest shipped configuration has 5 thousand; the parser takes seconds for a million
VALUES = 100_000  # after aliases are written out: ten lines can stand for more than a machine holds
DEPTH = 40  # of brackets within brackets


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with fewer surprises.

    Booleans are those of YAML 1.2, true and false (`no` stays the text that run.precision takes), dates stay text, and a key
    that is given twice is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The dict of a node, after its keys have been compared."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))


def parse(text: str, where: str) -> Any:
    """The plain value of a YAML text: dicts, lists, text, numbers, booleans and None.

    where: what the text is, for the error. Raises ValueError for anything that is not valid, or that would grow beyond the
    limits above.
    """
    try:
        if len(text) > CHARACTERS:
            raise ValueError(f"{len(text)} characters are more than a configuration has ({CHARACTERS})")
        _check_growth(text)
        value = yaml.load(text, Loader)
        _check_plain(value)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    return value


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. Raises ValueError with the file's name for others."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 (byte {error.start}): save it in that encoding") from error


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets one key of nested dicts in place; `key` has dots. Raises ValueError if it leads through something with no keys."""
    *parts, last = key.split(".")
    for part in parts:
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise ValueError(f"cannot set {key!r}: {part!r} is {values!r}, which has no keys")
    values[last] = value


def _check_growth(text: str) -> None:
    """Counts depth and values, aliases written out, before anything is built."""
    sizes: dict[str, int] = {}  # of what an anchor stands for
    stack: list[tuple[str | None, int]] = []  # open collections: anchor, values before it
    count = 0
    for event in yaml.parse(text, Loader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"*{event.anchor} stands inside what it names, or before it")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            stack.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = stack.pop()
            if anchor:
                sizes[anchor] = count - before
        if len(stack) > DEPTH:
            raise ValueError(f"more than {DEPTH} brackets within each other")
        if count > VALUES:
            raise ValueError(f"it stands for more than {VALUES} values")


def _check_plain(value: Any) -> None:
    """Raises ValueError for what an explicit tag has made, such as bytes or sets."""
    if isinstance(value, dict):
        _check_plain(list(value))
        _check_plain(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            _check_plain(item)
    elif not isinstance(value, (str, int, float, type(None))):
        raise ValueError(f"a {type(value).__name__} is no value of a configuration")
