"""Every sentence that docs/troubleshooting.md explains is one that the code says: its fixed parts stand in one text."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("backbones", "heads", "train", "weights")
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OURS = PAGE.partition("## Sentences of other programs")[0]
SENTENCES = re.findall(r"^- \*\*`(.+?)`\*\* ", OURS, re.MULTILINE)


def texts(path: Path) -> list[str]:
    """The texts of a file; what an f-string fills in is a null character."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


# all in one, with a sign between them that no text has
SAID = "\1".join(text for name in PACKAGES for path in (ROOT / name).rglob("*.py") for text in texts(path))


def pattern(sentence: str) -> re.Pattern:
    """The sentence with anything in the place of each run of dots; signs at its ends may lie in another text."""
    parts = [part for part in re.split(r"\.{3,}", sentence) if part.strip(" :;()")]
    parts[0], parts[-1] = parts[0].lstrip(" :;"), parts[-1].rstrip(" :;")
    return re.compile("[^\1]*?".join(map(re.escape, parts)))


def test_the_page_has_enough_of_them():
    assert len(SENTENCES) >= 40 and len(set(SENTENCES)) == len(SENTENCES)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_stands_in_the_code(sentence):
    assert pattern(sentence).search(SAID), sentence


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_says_enough_to_be_found(sentence):
    assert len(re.sub(r"\.{3,}|\W", "", sentence)) >= 10
