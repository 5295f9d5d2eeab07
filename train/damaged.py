"""Damaged files that a run skips: which, and whether they are still few enough (data.skip_unreadable).

RUN/unreadable.txt lists them, one "split: complaint" per line, sorted. In training another sample stands for a damaged one; in
evaluation it is left out. Both depend on the files alone, not on processes, loader workers or having been interrupted.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from train import checkpoint
from train.checks import RunError
from train.data import ImageDataset


class Damaged:
    """Collects complaints about files, of any process, and stops the run when there are more than the share allows.

    share: of each split's samples that may be damaged, 0 = none; data: split -> data set, which learns how many that are.
    """

    def __init__(self, share: float, data: Mapping[str, ImageDataset]):
        self.share, self.sizes = share, {split: len(plain) for split, plain in data.items()}
        for plain in data.values():
            plain.may_skip = math.floor(share * len(plain))
        self.found: set[tuple[str, str]] = set()
        self.new: set[tuple[str, str]] = set()

    def note(self, split: str, batches: Iterable[Mapping[str, Any]]) -> None:
        """Takes the complaints out of this process's batches."""
        self.new |= {(split, complaint) for batch in batches for complaint in batch.get("unreadable", ())}

    def agree(self, accelerator: Accelerator, log: Any = None) -> None:
        """Brings the processes' complaints together; all of them call it at once.

        log: says what is new and knows the run folder. Raises RunError with the first files of a split that has too many.
        """
        if not self.share:
            return
        everyone = gather_object(sorted(self.new)) if accelerator.num_processes > 1 else self.new
        new, self.new = {tuple(entry) for entry in everyone} - self.found, set()
        self.found |= new
        for split, counted in self.counts().items():
            if counted > self.share * self.sizes[split]:
                listed = sorted(complaint for name, complaint in self.found if name == split)
                raise RunError(
                    f"{counted} of {self.sizes[split]} {split} files cannot be read, more than data.skip_unreadable="
                    f"{self.share:g} allows. Repair them, or take them out:\n  " + "\n  ".join(listed[:8])
                )
        if new and log is not None:
            skipped = ", ".join(f"{count} of {self.sizes[split]} {split}" for split, count in self.counts().items() if count)
            log.say(f"skipped so far: {skipped} files that cannot be read; new: {sorted(new)[0][1]}")
            if log.main:
                text = "".join(f"{split}: {complaint}\n" for split, complaint in sorted(self.found))
                checkpoint.write(log.folder / "unreadable.txt", lambda temporary: write_text(temporary, text))

    def counts(self) -> dict[str, int]:
        """Split -> damaged files seen so far."""
        return {split: sum(name == split for name, _ in self.found) for split in self.sizes}

    def load(self, path: Path) -> None:
        """What an earlier part of the run has found."""
        if path.is_file():
            entries = [line.partition(": ") for line in path.read_text(encoding="utf-8").splitlines()]
            self.found = {(split, complaint) for split, _, complaint in entries if split in self.sizes}


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8."""
    path.write_text(text, encoding="utf-8")
