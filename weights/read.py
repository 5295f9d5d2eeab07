"""Open a weights file without running anything in it, and say what it is where it is no weights file."""

import contextlib
import hashlib
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights import arrays
from weights.arrays import is_pickle

ROOM = 1 << 28  # bytes that a file may ask for beyond what it stores before it is refused: small files cannot harm
MARKS = [  # first bytes -> what such a file is, and what to do
    (rb"version https://git-lfs", "a Git LFS pointer ({size} bytes of text), not weights: fetch the real file (git lfs pull)"),
    (rb"\s*<(!doctype|html|\?xml|head)", "a web page, not weights: download the file itself, not the page around it"),
    (rb"\x89HDF", "an HDF5 file (Keras): save the weights as .safetensors or .pth"),
    (rb"\x93NUMPY", "one NumPy array: save the weights as .safetensors or .pth"),
    (rb"GGUF", "a GGUF file: save the weights as .safetensors or .pth"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "a compressed archive: unpack it, and load the file inside"),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|%PDF", "a picture or document, not weights"),
]
# Names that a file may hold beside its weights and that are read as data without a meaning: nothing of them is imported.
BUILTINS = "getattr|set|frozenset|slice|range|complex|object|bytearray|list|dict|tuple|int|float|str|bool"
DATA = rf"(numpy|_codecs|datetime|collections|fractions|decimal|uuid|torch(?!\.nn))\..*|(builtins|__builtin__)\.({BUILTINS})"
DATA += r"|(copyreg|copy_reg)\._reconstructor|functools\.partial"
# Modules whose classes, too, are refused: no settings have them, and a user should hear of a file that does.
REFUSED = {"os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "importlib", "runpy", "pty", "ctypes", "code"}
REFUSED |= {
    "commands",
    "pickle",
    "cPickle",
    "builtins",
    "__builtin__",
    "multiprocessing",
    "threading",
    "webbrowser",
    "operator",
    "asyncio",
    "tempfile",
    "io",
}


def digest(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


class Settings:
    """Stands in for a class of another program: takes any arguments, and is an empty dictionary that can be filled."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


class Data:
    """Stands in for a value of another program whose content no weights depend on: a NumPy number, a date."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def open_checkpoint(path: str | Path) -> dict:
    """What a weights file holds, on the CPU; nothing in it is executed, and classes of other programs are not imported.

    Settings of a training program come as empty dictionaries. The kind of file is read from its first bytes, whatever its
    name. Raises FileNotFoundError, or ValueError for a format that is not read, a damaged file, one that asks to execute code,
    and one that would fill much more memory than it stores.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
        raise ValueError(f"{path} is a folder: name the weights file in it{', ' * bool(inside)}{' or '.join(inside[:4])}")
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix in (".npz", ".npy", ".h5", ".onnx"):
        raise ValueError(f"{path}: {path.suffix} files are not read; save the weights as .safetensors or .pth")
    with open(path, "rb") as file:
        start, rest = file.read(64), file.read(448)
    size = path.stat().st_size
    if not start:
        raise ValueError(f"{path} is not a readable weights file: it is empty, perhaps an incomplete download")
    for mark, what in MARKS:
        if re.match(mark, start, re.IGNORECASE):
            raise ValueError(f"{path} is {what.format(size=size)}")
    if rest[193:198] == b"ustar":
        raise ValueError(f"{path} is a tar archive: unpack it, and load the file inside")
    if re.fullmatch(rb"[\x09\x0a\x0d\x20-\x7e]{16,}", start):
        raise ValueError(f"{path} is a text file, not weights; it begins {start[:40].decode()!r}")
    if start[8:9] == b"{" or (path.suffix == ".safetensors" and start[:2] not in (b"PK", b"\x80\x02")):
        return read_safetensors(path)
    if start[:2] == b"PK":
        check_zip(path, size)
    content = read_arrays(path) if is_pickle(start) else read_pickle(path)
    if isinstance(content, (list, tuple)) and any(isinstance(item, dict) for item in content):
        content = {str(i): item for i, item in enumerate(content)}  # (weights, epoch)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def check_zip(path: Path, size: int) -> None:
    """ValueError for a zip file that would unpack to much more than it stores: torch never compresses."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(f"{path} is not a readable weights file, perhaps an incomplete download: {error}") from error
    if not any(entry.filename.endswith("/data.pkl") for entry in entries):
        raise ValueError(f"{path} is a zip archive that torch.save did not write: unpack it, and load the file inside")
    if unpacked > size + ROOM:
        raise ValueError(f"{path} is refused: its {size} bytes would unpack to {unpacked}, which no weights file does")


def any_array(*_: Any) -> arrays.Array:
    """Stands in for NumPy's function that begins an array, of whatever class: its state fills it."""
    return arrays.Array()


ARRAYS = {name: any_array if name.endswith("._reconstruct") else stand_in for name, stand_in in arrays.NAMES.items()}
ARRAYS["builtins.bytes"] = arrays.empty  # as torch names it


def read_pickle(path: Path) -> Any:
    """torch.load of weights alone, with stand-ins for the classes of other programs that the file names; arrays as tensors."""
    stand_ins: list[Any] = []  # (class, "module.Name")
    while True:
        try:
            # an open file, as torch would look at the name
            with open(path, "rb") as file, safe_reading(path, stand_ins):
                content = torch.load(file, map_location="cpu", weights_only=True)
            return with_tensors(content) if any(known == "numpy.ndarray" for _, known in stand_ins) else content
        except Refused as error:
            name = error.name
            if name is None or not harmless(name) or name in {known for _, known in stand_ins} or len(stand_ins) > 500:
                raise ValueError(str(error)) from error
            stand_ins.append((ARRAYS.get(name, Data if re.fullmatch(DATA, name) else Settings), name))
        except ValueError:
            raise
        except Exception as error:  # damaged bytes end in any error: KeyError, IndexError, struct.error, MemoryError
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path} is not a readable weights file, perhaps an incomplete download: {text}") from error


def with_tensors(value: Any, seen: set[int] | None = None) -> Any:
    """Nested dictionaries and lists with tensors in the place of NumPy arrays; None for arrays that hold no numbers.

    seen: dictionaries and lists that are done: a file may name one several times.
    """
    seen = set() if seen is None else seen
    if isinstance(value, arrays.Array):
        try:
            return value.tensor()
        except ValueError:
            return None
    if isinstance(value, tuple):
        return tuple(with_tensors(item, seen) for item in value)
    if isinstance(value, (dict, list)) and id(value) not in seen:
        seen.add(id(value))
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = with_tensors(item, seen)
    return value


def harmless(name: str) -> bool:
    """Whether a global of a pickle, "module.Name", is read as data: known data types and classes, which stand-ins replace."""
    if name in ARRAYS or re.fullmatch(DATA, name):
        return True
    return name.split(".")[0] not in REFUSED and name.rpartition(".")[2].lstrip("_")[:1].isupper()


class Refused(ValueError):
    """A file that names code. name: "module.name" of what it names, None if that is not known."""

    def __init__(self, message: str, name: str | None = None):
        super().__init__(message)
        self.name = name


def refusal(path: str | Path, wanted: str) -> str:
    """The sentence about a file that names code, and what to do."""
    return (
        f"{path} is refused: reading it would execute code from the file ({wanted}). "
        "If you trust whoever made it, rewrite it where that code is installed: content = torch.load(path, "
        "weights_only=False); print(content.keys()); torch.save(content[the key of the weights], 'new.pth'), "
        "and load the new file"
    )


def read_arrays(path: Path) -> Any:
    """A pickle of arrays, detectron2's .pkl. ValueError for one that names code, or is damaged."""
    try:
        return arrays.read_arrays(path)
    except arrays.Named as error:
        raise ValueError(refusal(path, error.name)) from error
    except ValueError as error:
        raise ValueError(f"{path} is not a readable weights file, perhaps an incomplete download: {error}") from error


@contextlib.contextmanager
def safe_reading(path: str | Path, stand_ins: list[Any] | None = None) -> Iterator[None]:
    """Inside, torch.load(weights_only=True) of `path` refuses code with one sentence that says what to do.

    stand_ins: (class, "module.Name") to put in the place of names in the file.
    """
    try:
        with torch.serialization.safe_globals(stand_ins or []):
            yield
    except (pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):  # timm's own wording of the refusal
            raise
        found = re.findall(r"GLOBAL ([\w.<>]+?)\.? (?:was not|whose)", str(error))
        name = found[0] if found else None
        if name and "." not in name:
            name = f"builtins.{name}"
        if name is None and not re.search("reduce for|create new object|Can only|whose module", str(error)):
            text = re.sub(r"(?s).*WeightsUnpickler error: |\n.*", "", str(error))[:200] or "it ends too early"
            raise ValueError(f"{path} is not a readable weights file, perhaps an incomplete download: {text}") from error
        wanted = name or re.sub(r"(?s).*WeightsUnpickler error: |\n.*", "", str(error))[:200]
        raise Refused(refusal(path, wanted), name) from error
    except EOFError as error:
        raise ValueError(
            f"{path} is not a readable weights file, perhaps an incomplete download: {error or 'it ends too early'}"
        ) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError if it is damaged."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, and what torch says of types and sizes that it does not know
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is not a readable safetensors file, perhaps an incomplete download: {text}") from error


def safetensors_header(path: Path) -> tuple[dict[str, str], list[str]]:
    """(text in the header, names of the tensors) of a safetensors file; ValueError if it is damaged or of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file, perhaps an incomplete one: {error}") from error


def check_tensors(state: dict[str, Tensor], source: str) -> None:
    """ValueError for tensors that are no plain numbers (sparse, quantized) or claim far more numbers than are stored."""
    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_nested:
            kind = "quantized" if value.is_quantized else "nested" if value.is_nested else "sparse"
            raise ValueError(f"{source} holds a {kind} tensor, {name}: save it dense, value.to_dense() or .dequantize()")
        if value.is_meta:
            continue
        asked, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if asked > stored + ROOM:
            raise ValueError(
                f"{source} is refused: {name} {list(value.shape)} asks for {asked / 1e9:.1f} GB and the file stores {stored} "
                "bytes of it"
            )
