"""ADE20K SceneParse150 (Zhou et al. 2017): the ADEChallengeData2016 folders, and the same data in parquet files.

In the files 0 is "other or unlabelled" and 1..150 are the classes; here 0 becomes the ignore id 255 and the classes 0..149.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np

from train.data.base import FileDataset
from train.data.files import Unreadable
from train.data.finding import images_in, need, read_text

# first name of each row of objectInfo150.txt
CLASSES = (
    """
wall; building; sky; floor; tree; ceiling; road; bed; windowpane; grass; cabinet; sidewalk; person; earth; door; table;
mountain; plant; curtain; chair; car; water; painting; sofa; shelf; house; sea; mirror; rug; field; armchair; seat;
fence; desk; rock; wardrobe; lamp; bathtub; railing; cushion; base; box; column; signboard; chest of drawers; counter;
sand; sink; skyscraper; fireplace; refrigerator; grandstand; path; stairs; runway; case; pool table; pillow; screen
door; stairway; river; bridge; bookcase; blind; coffee table; toilet; flower; book; hill; bench; countertop; stove;
palm; kitchen island; computer; swivel chair; boat; bar; arcade machine; hovel; bus; towel; light; truck; tower;
chandelier; awning; streetlight; booth; television; airplane; dirt track; apparel; pole; land; bannister; escalator;
ottoman; bottle; buffet; poster; stage; van; ship; fountain; conveyer belt; canopy; washer; plaything; swimming pool;
stool; barrel; basket; waterfall; tent; bag; minibike; cradle; oven; ball; food; step; tank; trade name; microwave; pot;
animal; bicycle; lake; dishwasher; screen; blanket; sculpture; hood; sconce; vase; traffic light; tray; ashcan; fan;
pier; crt screen; plate; monitor; bulletin board; shower; radiator; glass; clock; flag
""".replace("\n", " ")
    .strip()
    .split("; ")
)


def shifted(ids: np.ndarray, path: Path | str, ignore_index: int) -> np.ndarray:
    """File ids 0..150 -> class ids: 0 ignored, the others minus 1. ValueError names the file for any other id."""
    if ids.max() > len(CLASSES):
        raise ValueError(
            f"{path}: label {int(ids.max())} is outside 0..{len(CLASSES)}; this reader wants the original files "
            "(0 = unlabelled), not labels that were already shifted or converted"
        )
    return np.where(ids == 0, ignore_index, ids - 1)


class ADE20K(FileDataset):
    """ADE20K as the scene parsing challenge has it, 150 classes.

    root is ADEChallengeData2016 or the folder that holds it: {images,annotations}/{training,validation}.

    Class names come from objectInfo150.txt where it is present.
    """

    provides = ("mask",)
    classes = CLASSES

    def find(self) -> None:
        base = self.root / "ADEChallengeData2016"
        base = base if base.is_dir() else self.root
        folder = "training" if self.split == "train" else "validation"
        self.images = images_in(base / "images" / folder, f"the {folder} images", "ADE20K")
        self.masks = base / "annotations" / folder
        if "mask" in self.targets:
            need(self.masks, f"the {folder} annotations", "ADE20K")
        if (base / "objectInfo150.txt").exists():
            self.classes = read_names(base / "objectInfo150.txt")

    def image_files(self) -> list[Path]:
        return self.images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        sample = {"image": self.image(image), "path": image}
        if "mask" in self.targets:
            path = self.masks / f"{image.stem}.png"
            sample.update(mask=shifted(self.ids(path), path, self.ignore_index), mask_path=path)
        return sample


def read_names(path: Path) -> list[str]:
    """First name of each class from objectInfo150.txt. ValueError if there are not 150."""
    rows = [line.split("\t") for line in read_text(path).splitlines()[1:] if line.strip()]
    names = [row[-1].split(",")[0].strip() for row in rows]
    if len(names) != len(CLASSES):
        raise ValueError(f"{path}: expected {len(CLASSES)} classes, found {len(names)}")
    return names


class ADE20KParquet(FileDataset):
    """The same images in parquet files with columns `image` and `annotation`, each {"bytes", "path"} (Hugging Face's form).

    root (or its `data` folder) holds train*.parquet and validation*.parquet. Needs pyarrow. Only the row group that holds a
    sample is read, and kept for its neighbours. Raises ImportError naming the extra, ValueError for files of another kind.
    """

    provides = ("mask",)
    classes = CLASSES

    def find(self) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ImportError(f"reading parquet files needs pyarrow (pip install backbone-zoo[data]): {error}") from error
        base = self.root / "data" if (self.root / "data").is_dir() else self.root
        files = sorted(base.glob("train*.parquet" if self.split == "train" else "val*.parquet"))
        if not files:
            raise FileNotFoundError(
                f"ADE20KParquet: looked for {'train' if self.split == 'train' else 'val'}*.parquet in {base}"
            )
        self.groups: list[tuple[Path, int]] = []  # one per row group: file, group
        starts = [0]
        for path in files:
            try:
                meta = parquet.ParquetFile(path)
            except Exception as error:  # pyarrow's own hierarchy, which exists only where pyarrow does
                raise ValueError(f"{path}: not a readable parquet file ({error})") from error
            missing = {"image", "annotation"} - set(meta.schema_arrow.names)
            if missing:
                raise ValueError(f"{path}: no column {sorted(missing)[0]!r}; it has {', '.join(meta.schema_arrow.names)}")
            for group in range(meta.num_row_groups):
                self.groups.append((path, group))
                starts.append(starts[-1] + meta.metadata.row_group(group).num_rows)
        self.starts = np.array(starts)
        self._held: tuple[int, list] = (-1, [])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, index: int) -> dict[str, Any]:
        import pyarrow.parquet as parquet

        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        if self._held[0] != group:
            path, number = self.groups[group]
            table = parquet.ParquetFile(path).read_row_group(number, columns=["image", "annotation"])
            self._held = (group, table.to_pylist())
        row = self._held[1][index - int(self.starts[group])]
        place = f"{self.groups[group][0]}#{index - int(self.starts[group])}"
        try:
            image, mask = (io.BytesIO(row[name]["bytes"]) for name in ("image", "annotation"))
        except (TypeError, KeyError) as error:
            raise Unreadable(f"{place}: not a readable image ({error})") from error
        sample: dict[str, Any] = {"image": self.image(image, place), "path": place}
        if "mask" in self.targets:
            sample["mask"] = shifted(self.ids(mask, place), place, self.ignore_index)
        return sample
