"""Renaming rules, which the converters are written in."""

import re
from collections.abc import Callable, Sequence

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]  # (regular expression, replacement), in order


def rename(key: str, rules: Rules) -> str:
    """The first rule that matches rewrites the key; a key that none matches stays."""
    for pattern, replacement in rules:
        new, count = re.subn(pattern, replacement, key)
        if count:
            return new
    return key


def rename_all(key: str, rules: Rules) -> str:
    """Every rule rewrites the key in turn."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
