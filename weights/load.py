"""Open a file without running anything in it, find its format, convert it, load it strictly, and say what happened."""

import argparse
import contextlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from weights.convert import backbone, converter, fit_shapes, layers, source_format, split, to_native, unwrap

FRESH = r"feature_norms\."  # norms of returned maps: classification files lack them; they start as the identity's affine part
COUNTER = "num_batches_tracked"  # of BatchNorm; used by no result in evaluation


@dataclass
class Report:
    """What `load_checkpoint` did, by the model's names except where stated. Printing it is readable."""

    source: str  # the file, or "a state dict"
    format: str  # "official", "official-dense", "timm", "huggingface" or "native"
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # of the backbone, absent from the file; they keep their values
    unexpected: list[str] = field(default_factory=list)  # in the file (its names for heads), of no use to the model
    resized: dict[str, tuple[tuple, tuple]] = field(default_factory=dict)  # table or embedding: (shape in the file, now)
    dropped: dict[str, tuple[tuple, tuple]] = field(default_factory=dict)  # classifier: (shape in the file, in the model)
    untouched: list[str] = field(default_factory=list)  # of the model but not of its backbone: heads

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.format} format, {len(self.loaded)} tensors loaded"]
        for what in ("missing", "unexpected", "untouched"):
            if names := getattr(self, what):
                lines.append(f"  {what}: {summary(names)}")
        for what in ("resized", "dropped"):
            lines += [f"  {what}: {name} {list(old)} -> {list(new)}" for name, (old, new) in getattr(self, what).items()]
        return "\n".join(lines)


def summary(names: list[str], shown: int = 6) -> str:
    """Count, and the names with their numbers folded together: "24: decode_head.convs.*.weight, ..."."""
    folded = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
    return f"{len(names)}: {', '.join(folded[:shown])}" + (", ..." if len(folded) > shown else "")


def load_checkpoint(model: nn.Module, path_or_state_dict: str | Path | dict, strict: bool = True) -> Report:
    """Load a checkpoint in any known format into `model`, in place.

    model: a backbone, timm's feature wrapper around one, or a dense predictor with `.backbone`; a file with every weight of the
    whole model fills it whole, any other fills the backbone. path_or_state_dict: .pth, .pt, .tar,
    .bin or .safetensors, or what was read from one, wrapped (model, state_dict_ema, module., backbone. ...) or bare.
    strict: False lets the classifier differ in size (it is dropped) or be absent, the final norm be absent from a
    dense-prediction file, and the file hold names that the backbone lacks; in any case every other weight of the backbone must
    be found. Always allowed: heads of dense-prediction files (reported as unexpected), a classifier in the file where the
    model has none, layers behind the last map of a wrapped backbone, feature_norms that the file lacks (they stay as they are).

    Raises FileNotFoundError for a missing file and ValueError, which names what is wrong, for everything else.
    """
    if isinstance(path_or_state_dict, dict):
        source, checkpoint = "a state dict", path_or_state_dict
    else:
        source, checkpoint = str(path_or_state_dict), open_checkpoint(path_or_state_dict)
    state = unwrap(checkpoint)
    if not state:
        raise ValueError(f"{source} holds no weights: no tensors under {', '.join(list(checkpoint)[:8]) or 'any name'}")
    *wrappers, target = layers(model)
    for wrapper in wrappers:
        own, rest = split(state, wrapper)
        whole, resized = fit_shapes(to_native(own, wrapper), wrapper, own)
        wanted, form = wrapper.state_dict(), source_format(own, wrapper)
        extra = sorted(whole.keys() - wanted.keys())
        if form == "official-dense" and strict:
            _check_dense(source, [name for name in wanted if name not in whole and not name.endswith(COUNTER)], extra)
        if wanted.keys() <= whole.keys():
            report = Report(source, form, unexpected=sorted([*rest, *extra]), resized=resized)
            if not strict and hasattr(wrapper, "get_classifier"):
                for name in [name for name in wanted if name.startswith(classifier_names(wrapper))]:
                    if whole[name].shape != wanted[name].shape:
                        report.dropped[name] = tuple(whole.pop(name).shape), tuple(wanted[name].shape)
            return _fill(wrapper, whole, report)

    own, heads = split(state, target)
    report = Report(source, source_format(own, target), unexpected=sorted(heads))
    native, report.resized = fit_shapes(to_native(own, target), target, own)
    wanted = target.state_dict()
    report.untouched = _outside(model, target)
    classifier = classifier_names(target)

    _check_anything_fits(report, native, wanted)
    if hasattr(target, "adapt"):
        target.adapt(native)
        wanted = target.state_dict()
    for name in [name for name in native if name in wanted and native[name].shape != wanted[name].shape]:
        report.dropped[name] = tuple(native.pop(name).shape), tuple(wanted[name].shape)
    report.missing = [name for name in wanted if name not in native and name not in report.dropped]
    extra = [name for name in native if name not in wanted]
    report.unexpected += extra
    _check_shapes(report, classifier, strict)
    _check_missing(report, classifier, len(wanted), strict)
    if strict and not wrappers and (extra := [name for name in extra if not name.startswith(classifier)]):
        hint = ""
        if any(re.match(FRESH, name) for name in extra):
            hint = "; build the model with feature_norms=True to use the norms of its maps"
        raise ValueError(f"{report.source} holds weights that the model lacks, {summary(extra)}{hint}; or pass strict=False")
    return _fill(target, {name: value for name, value in native.items() if name in wanted}, report)


def _fill(module: nn.Module, state: dict[str, Tensor], report: Report) -> Report:
    """Copy `state` into `module` (put it there, where the module is on the meta device) and note what was loaded."""
    wanted = module.state_dict()
    report.loaded = [name for name in wanted if name in state]
    pairs = {name: (state[name].shape, wanted[name].shape) for name in report.loaded}
    if wrong := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
        raise ValueError(f"{report.source} has other shapes than the model: {_shapes(wrong)}")
    assign = any(value.is_meta for value in wanted.values())
    module.load_state_dict({name: state[name] for name in report.loaded}, strict=False, assign=assign)
    return report


def _check_anything_fits(report: Report, native: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    if not native.keys() & wanted.keys():
        raise ValueError(
            f"{report.source} does not fit this model: none of its {len(native)} names ({', '.join(list(native)[:3])}, ...) "
            f"is among the model's ({', '.join(list(wanted)[:3])}, ...)"
        )


def _check_shapes(report: Report, classifier: tuple[str, ...], strict: bool) -> None:
    wrong = {name: shapes for name, shapes in report.dropped.items() if not name.startswith(classifier)}
    if wrong:
        hint = ""
        if any(len(old) == len(new) == 4 and old[1] != new[1] and old[::2] == new[::2] for old, new in wrong.values()):
            hint = "; for other input channels load the file with pretrained=True, pretrained_cfg_overlay=dict(file=...)"
        raise ValueError(f"{report.source} has other shapes than the model: {_shapes(wrong)}{hint}")
    if strict and report.dropped:
        raise ValueError(
            f"{report.source} has a classifier of another size: {_shapes(report.dropped)}; "
            "build the model with its number of classes, or pass strict=False to leave the classifier as it is"
        )


def _check_dense(source: str, lost: list[str], extra: list[str]) -> None:
    """ValueError unless the file with a head has exactly the predictor's weights."""
    if lost:
        text = f"{source} lacks weights of this predictor, {summary(lost)}"
    elif extra:
        text = f"{source} holds weights that this predictor lacks, {summary(extra)}"
        if any("feature_norms." in name for name in extra):
            text += "; build the backbone with feature_norms=True to use the norms of its maps"
    else:
        return
    raise ValueError(f"{text}; pass strict=False to load the backbone alone")


def _check_missing(report: Report, classifier: tuple[str, ...], total: int, strict: bool) -> None:
    free = (FRESH,)
    if not strict:
        free += tuple(re.escape(name) for name in classifier) + ((r"norm\.",) if report.format == "official-dense" else ())
    lost = [name for name in report.missing if not name.endswith(COUNTER) and not re.match("|".join(free), name)]
    if not lost:
        return
    found = total - len(report.missing)
    text = f"{report.source} holds {found} of the {total} tensors that the model needs; absent are {summary(lost)}"
    if all(name.startswith((*classifier, "norm.")) for name in lost):
        text += "; it has no classifier: build with features_only=True or num_classes=0, or pass strict=False"
    raise ValueError(text)


def _shapes(pairs: dict[str, tuple[tuple, tuple]], shown: int = 4) -> str:
    """ "name [file's shape] for [model's shape]", of the first few."""
    texts = [f"{name} {list(old)} for the model's {list(new)}" for name, (old, new) in list(pairs.items())[:shown]]
    return ", ".join(texts) + (f" and {len(pairs) - shown} more" if len(pairs) > shown else "")


def _outside(model: nn.Module, target: nn.Module) -> list[str]:
    """Names of the model's tensors that are not the backbone's."""
    inside = {id(value) for value in target.state_dict(keep_vars=True).values()}
    return [name for name, value in model.state_dict(keep_vars=True).items() if id(value) not in inside]


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifiers' parameters, e.g. ("head.fc.",), also where they are an Identity."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()
    found = found if isinstance(found, (tuple, list)) else (found,)
    names = [name for name, module in model.named_modules(remove_duplicate=False) if any(module is layer for layer in found)]
    stated = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()  # also an auxiliary one
    names += [stated] if isinstance(stated, str) else stated
    return tuple(f"{name}." for name in dict.fromkeys(names)) or ("head.",)


def complete_state_dict(state_dict: dict, model: nn.Module, features: bool = False) -> dict[str, Tensor]:
    """timm's pretrained filter for our models: converted, and refused with a ValueError if a weight of the backbone is absent.

    timm compares names only when the number of classes is the file's; this always does. feature_norms that the file lacks, and
    the final norm if the model will only give features, keep the model's values.
    """
    own, wanted = split(unwrap(state_dict), model)[0], model.state_dict()
    native = fit_shapes(to_native(own, model), model, own)[0]
    kept = FRESH + (r"|norm\." if features else "") + rf"|.*\.{COUNTER}$"
    native |= {name: value for name, value in wanted.items() if name not in native and re.match(kept, name)}
    report = Report("the checkpoint", "pretrained")
    _check_anything_fits(report, native, wanted)
    classifier = classifier_names(model)  # timm's part: dropped when the number of classes differs, else compared strictly
    report.missing = [name for name in wanted if name not in native and not name.startswith(classifier)]
    _check_missing(report, classifier, len(wanted), strict=True)
    if hasattr(model, "adapt"):
        model.adapt(native)
    return native


def convert_file(
    model: nn.Module | str, source: str | Path, destination: str | Path, naming: str = "native", **model_args
) -> Report:
    """Rewrite a checkpoint as safetensors under our names ("native") or the authors' ("official"); returns the load's report.

    model: a backbone or its name (`backbones` must have been imported); a named model is built with the file's number of
    classes, without a classifier if the file has none, and with feature_norms if the file has them; model_args: further
    arguments of it, such as img_size. The heads of a dense-prediction file are left out and reported as unexpected.
    """
    from safetensors.torch import save_file

    if naming not in ("native", "official"):
        raise ValueError(f"naming must be 'native' or 'official', got {naming!r}")
    destination = Path(destination)
    if destination.suffix != ".safetensors":
        raise ValueError(f"a checkpoint is written as .safetensors, got {destination}")
    state = unwrap(open_checkpoint(source))
    if isinstance(model, str):
        model = _build_for(model, state, model_args)
    report = load_checkpoint(model, state, strict=False)
    report.source = str(source)
    target = backbone(model)
    result = {name: value for name, value in target.state_dict().items() if name in set(report.loaded)}
    if naming == "official":
        result = converter(target).to_official(result, target)
    metadata = {"format": "pt", "source": Path(source).name, "source_format": report.format, "naming": naming}
    destination.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().contiguous().clone() for name, value in result.items()}, destination, metadata)
    return report


def _build_for(name: str, state: dict[str, Tensor], model_args: dict) -> nn.Module:
    """Model `name` without memory (meta device), its classifier and feature norms as the file has them."""
    import timm

    model = timm.create_model(name, **model_args, device="meta")
    native = to_native(split(state, model)[0], model)
    rows = [
        value.shape[0] for key, value in native.items() if key.startswith(classifier_names(model)) and key.endswith("weight")
    ]
    args = {"num_classes": rows[0] if rows else 0}
    if any(re.match(FRESH, key) for key in native):
        args["feature_norms"] = True
    return timm.create_model(name, **(args | model_args), device="meta")


# Settings that training programs save beside their weights: plain containers here, so that their files can be read.
HARMLESS = [(argparse.Namespace, "argparse.Namespace"), (OrderedDict, "yacs.config.CfgNode")]


def open_checkpoint(path: str | Path) -> dict:
    """What a weights file holds, on the CPU; nothing in it is executed.

    Raises FileNotFoundError, or ValueError for a format that is not read and for a file that asks to execute code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix in (".npz", ".npy", ".h5", ".onnx"):
        raise ValueError(f"{path}: {path.suffix} files are not read; save the weights as .safetensors or .pth")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with safe_reading(path):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a readable weights file, perhaps an incomplete download: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


@contextlib.contextmanager
def safe_reading(path: str | Path) -> Iterator[None]:
    """Inside, torch.load(weights_only=True) of `path` passes over the settings in HARMLESS, and its errors become ValueErrors
    that say what to do."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            yield
    except (pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):  # timm's own wording of the refusal
            raise
        found = re.findall(r"(?:GLOBAL|globals:) ([\w.]+(?:, [\w.]+)*?)\.? ", str(error))
        wanted = ", ".join(dict.fromkeys(found)).rstrip(".") or str(error)
        raise ValueError(
            f"{path} is refused: reading it would execute code from the file ({wanted}). "
            "If you trust whoever made it, rewrite it where that code is installed, "
            "torch.save(torch.load(path, weights_only=False)['model'], 'new.pth'), and load the new file"
        ) from error
    except EOFError as error:
        raise ValueError(f"{path} is not a readable weights file, perhaps an incomplete download: {error}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file, perhaps an incomplete download: {error}") from error
