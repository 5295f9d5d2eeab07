"""7-Scenes RGB-D frames (Shotton et al. 2013): 16-bit depth in millimetres, 0 and 65535 both mean "no reading"."""

from pathlib import Path
from typing import Any

from train.data.base import FileDataset
from train.data.finding import inside, need, read_list
from train.depth import DepthSpec


class SevenScenes(FileDataset):
    """One scene: root holds `train.txt` and `val.txt` ("image depth", relative to root), or the official layout.

    The official one: `seq-NN/frame-NNNNNN.color.png` and `.depth.png`, TrainSplit.txt and TestSplit.txt ("sequence1" per line).
    """

    provides = ("depth",)
    depth: DepthSpec = DepthSpec(divisor=1000, min_depth=0.1, max_depth=10.0)

    def find(self) -> None:
        listing = self.root / f"{self.split}.txt"
        official = self.root / ("TrainSplit.txt" if self.split == "train" else "TestSplit.txt")
        if listing.exists():
            rows = read_list(listing, 2, "SevenScenes")
            self.pairs = [(inside(self.root, row[0]), inside(self.root, row[1])) for row in rows]
        else:
            need(official, f"{listing.name} or the official split", "SevenScenes")
            self.pairs = []
            for word, *_ in read_list(official, 1, "SevenScenes"):
                number = word.removeprefix("sequence")
                if not number.isdecimal():
                    raise ValueError(f"{official}: a line must be sequence1, sequence2, ..., got {word!r}")
                folder = need(self.root / f"seq-{int(number):02d}", f"{word} of {official.name}", "SevenScenes")
                colors = sorted(folder.glob("frame-*.color.*"))
                self.pairs += [(path, path.with_name(path.name.split(".")[0] + ".depth.png")) for path in colors]
            if not self.pairs:
                raise FileNotFoundError(f"SevenScenes: no frame-*.color.png in the sequences of {official}")
        need(self.pairs[0][0], "the first image", "SevenScenes")

    def image_files(self) -> list[Path]:
        return [image for image, _ in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> dict[str, Any]:
        image, depth = self.pairs[index]
        sample = {"image": self.image(image), "path": image}
        if "depth" in self.targets:
            sample.update(depth=self.metres(depth, self.depth.divisor, invalid=(0, 65535)), depth_path=depth)
        return sample
