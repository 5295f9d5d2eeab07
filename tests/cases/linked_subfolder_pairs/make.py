"""Make the links, which do not survive every copy: python make.py TARGET_FOLDER"""

import os
import shutil
import sys
from pathlib import Path

here, out = Path(__file__).resolve().parent, Path(sys.argv[1])
for part, own, folder in (("images", "own.png", "im"), ("masks", "own_mask.png", "mk")):
    (out / part / "train" / "own").mkdir(parents=True)
    shutil.copy(here / own, out / part / "train" / "own" / "o.png")
    for store in "ab":
        os.symlink(here / "store" / store / folder, out / part / "train" / store)
