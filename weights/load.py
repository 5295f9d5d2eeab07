"""Open a file without running anything in it, find its format, convert it, load it strictly, and say what happened."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weights.choose import Choice, choose
from weights.convert import Shapes, authors, backbone, converter, fit_shapes, huggingface, layers, source_format, to_native
from weights.read import check_tensors, open_checkpoint

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
    resized: Shapes = field(default_factory=dict)  # table or embedding: (shape in the file, now)
    dropped: Shapes = field(default_factory=dict)  # what counts classes: (shape in the file, in the model)
    untouched: list[str] = field(default_factory=list)  # of the model but not of its backbone: heads
    choice: str = ""  # where in the file the weights were, if it holds several that fit or wraps them; empty: as they are
    others: list[str] = field(default_factory=list)  # where else in the file are weights that would fit
    warnings: list[str] = field(default_factory=list)  # what is doubtful about the weights

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.format} format, {len(self.loaded)} tensors loaded"]
        if self.others:
            lines.append(f"  chosen: {self.choice}; which='...' takes another: {', '.join(self.others)}")
        for what in ("missing", "unexpected", "untouched"):
            if names := getattr(self, what):
                lines.append(f"  {what}: {summary(names)}")
        for what in ("resized", "dropped"):
            lines += [f"  {what}: {name} {list(old)} -> {list(new)}" for name, (old, new) in getattr(self, what).items()]
        lines += [f"  warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def summary(names: list[str], shown: int = 6) -> str:
    """Count, and the names with their numbers folded together: "24: decode_head.convs.*.weight, ..."."""
    folded = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
    return f"{len(names)}: {', '.join(folded[:shown])}" + (", ..." if len(folded) > shown else "")


def convert_state_dict(state_dict: dict, model: nn.Module, which: str | None = None) -> dict[str, Tensor]:
    """A checkpoint's content in any known format -> the names and shapes of `model`, or of the backbone inside a mere wrapper.

    Native names pass unchanged. What a dense-prediction file holds beside the backbone (decode_head.*) is left out for a
    backbone, and converted for a dense predictor. which: as for load_checkpoint.
    """
    model = next((module for module in layers(model) if hasattr(module, "family")), backbone(model))
    own = _choose(state_dict, model, which, "the state dict").state
    return _convert(own, model, "the state dict")[0]


def load_checkpoint(
    model: nn.Module, path_or_state_dict: str | Path | dict, strict: bool = True, which: str | None = None
) -> Report:
    """Load a checkpoint in any known format into `model`, in place.

    The weights may lie under any name of the file and behind any prefix that all of them carry: what has most of the model's
    names is taken, an average of the weights or a teacher before the raw weights or a student. The report names the choice.

    Args:
        model: a backbone, timm's feature wrapper around one, or a dense predictor with `.backbone`. A file with heads fills the
            predictor, any other its backbone.
        path_or_state_dict: .pth, .pt, .tar, .bin or .safetensors, or what was read from one.
        strict: False lets what counts classes differ in size (it is dropped) or be absent, heads of a predictor be absent or
            others (every head that fits is loaded), the final norm be absent from a dense-prediction file, and the file hold
            names that the backbone lacks. In any case every other weight of the backbone must be found. Always allowed: heads
            of dense-prediction files for a backbone (reported as unexpected), a classifier in the file where the model has
            none, layers behind the last map of a wrapped backbone, feature_norms that the file lacks (they stay as they are).
        which: a part of the place of the weights in the file, such as "student" or "model_ema".

    Raises FileNotFoundError for a missing file and ValueError, which names what is wrong, for everything else; the model is
    then as it was.
    """
    if isinstance(path_or_state_dict, dict):
        source, checkpoint = "a state dict", path_or_state_dict
    else:
        source, checkpoint = str(path_or_state_dict), open_checkpoint(path_or_state_dict)
    return _load(model, checkpoint, source, strict, which)


def _load(model: nn.Module, checkpoint: dict, source: str, strict: bool, which: str | None) -> Report:
    """`load_checkpoint` of what was read already; source: what errors and the report call it."""
    *wrappers, target = layers(model)
    for wrapper in wrappers:
        found = _choose(checkpoint, wrapper, which, source)
        if (report := _load_whole(wrapper, found, source, strict)) is not None:
            return report

    found = _choose(checkpoint, target, which, source)
    form = found.format or source_format(found.state, target)
    report = Report(source, form, unexpected=sorted(found.rest))
    _note_choice(report, found)
    native, report.resized = _convert(found.state, target, source)
    wanted = target.state_dict()
    report.untouched = _outside(model, target)
    classifier = classifier_names(target)

    _check_anything_fits(report, native, wanted)
    if hasattr(target, "adapt"):
        target.adapt(native)  # type: ignore[operator]
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


def _choose(checkpoint: dict, model: nn.Module, which: str | None, source: str) -> Choice:
    """The weights in a file's content; ValueError, which names the file, if there are none or they are no plain numbers."""
    try:
        found = choose(checkpoint, model, which)
    except ValueError as error:
        raise ValueError(f"{source} {error}" if str(error).startswith("holds") else f"{source}: {error}") from error
    check_tensors(found.state, source)
    with _one_sentence(source):
        found.state, found.format = authors(found.state)
    return found


def _convert(state: dict[str, Tensor], model: nn.Module, source: str) -> tuple[dict[str, Tensor], Shapes]:
    """(the model's names and shapes, what was resampled)."""
    with _one_sentence(source):
        return fit_shapes(to_native(state, model), model, state)


@contextlib.contextmanager
def _one_sentence(source: str) -> Iterator[None]:
    """Inside, a tensor whose shape its name never has (no dimensions, no columns) is a ValueError, whatever it led to."""
    try:
        yield
    except ValueError:
        raise
    except (KeyError, IndexError, TypeError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{source} has a tensor of a shape that does not go with its name ({text})") from error


def _note_choice(report: Report, found: Choice) -> None:
    report.choice, report.others = (str(found), found.others) if found.path or found.prefix or found.others else ("", [])


def _load_whole(model: nn.Module, found: Choice, source: str, strict: bool) -> Report | None:
    """Fill a wrapper around a backbone, heads included; None if the file has nothing for its heads.

    With strict=False each head is loaded for which the file has every weight, but for what counts classes.
    """
    whole, resized = _convert(found.state, model, source)
    wanted, form = model.state_dict(), source_format(found.state, model)
    report = Report(
        source,
        found.format or form,
        unexpected=sorted([*found.rest, *(whole.keys() - wanted.keys())]),
        resized=resized,
    )
    _note_choice(report, found)
    if doubts := getattr(converter(model), "doubts", None):
        report.warnings += doubts(found.state, model)
    if not wanted.keys() <= whole.keys():
        if getattr(model, "family", None) != "dense":
            return None
        heads: dict[str, list[str]] = {}
        for name in wanted:
            if not name.startswith("backbone."):
                heads.setdefault(_head(name), []).append(name)
        found_heads = [names for names in heads.values() if any(name in whole for name in names)]
        if not found_heads and form != "official-dense":
            return None
        lost = [name for name in wanted if name not in whole and not name.endswith(COUNTER)]
        if strict:
            _check_dense(source, lost, sorted(whole.keys() - wanted.keys()))
        classes = classifier_names(model)
        unfit = [name for name in lost if not name.startswith("backbone.")]
        unfit += [
            name
            for name in wanted.keys() & whole.keys()
            if whole[name].shape != wanted[name].shape and not name.startswith(("backbone.", *classes))
        ]
        out = {_head(name) for name in unfit}
        if len(out) == len(heads):
            return None  # another head than the model's: the backbone alone is loaded
        for name in (name for head in out for name in heads[head]):
            whole.pop(name, None)
            report.untouched.append(name)
        report.missing = [name for name in wanted if name not in whole and name not in report.untouched]
        if lost := [name for name in report.missing if name.startswith("backbone.") and not name.endswith(COUNTER)]:
            raise ValueError(f"{source} lacks weights of the predictor's backbone, {summary(lost)}")
    elif strict and form == "official-dense":
        _check_dense(source, [], sorted(whole.keys() - wanted.keys()))
    if not strict:
        for name in [name for name in wanted if name in whole and name.startswith(classifier_names(model))]:
            if whole[name].shape != wanted[name].shape:
                report.dropped[name] = tuple(whole.pop(name).shape), tuple(wanted[name].shape)
    return _fill(model, whole, report)


def _head(name: str) -> str:
    """Which head a weight of a predictor belongs to: "head", "aux_head", "heads.mask"; necks count as their head's."""
    parts = re.sub(r"^(aux_)?necks?\.", lambda m: m[0].replace("neck", "head"), name).split(".")
    return ".".join(parts[:2]) if parts[0] == "heads" else parts[0]


def _fill(module: nn.Module, state: dict[str, Tensor], report: Report) -> Report:
    """Copy `state` into `module` (put it there, where the module is on the meta device) and note what was loaded."""
    wanted = module.state_dict()
    report.loaded = [name for name in wanted if name in state]
    pairs = {name: (tuple(state[name].shape), tuple(wanted[name].shape)) for name in report.loaded}
    if wrong := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
        raise ValueError(f"{report.source} has other shapes than the model: {_shapes(wrong)}")
    for name in report.loaded:
        if wanted[name].is_floating_point() and not state[name].is_floating_point():
            raise ValueError(f"{report.source} holds {name} as {state[name].dtype}, the model needs {wanted[name].dtype}")
        if state[name].is_meta and not wanted[name].is_meta:
            raise ValueError(f"{report.source} holds the shape of {name} without numbers (a tensor of the meta device)")
    broken = [name for name in report.loaded if not state[name].is_meta and not torch.isfinite(state[name]).all()]
    if broken:
        report.warnings.append(f"NaN or infinite numbers in {summary(broken)}")
    assign = any(value.is_meta for value in wanted.values())
    module.load_state_dict({name: state[name] for name in report.loaded}, strict=False, assign=assign)
    return report


def _check_anything_fits(report: Report, native: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    if not native.keys() & wanted.keys():
        hint = ""
        if any(re.search(huggingface.MARKS, name) for name in native):
            hint = f"; they are Hugging Face's names, of which these families are read: {huggingface.READ}"
        raise ValueError(
            f"{report.source} does not fit this model: none of its {len(native)} names ({', '.join(list(native)[:3])}, ...) "
            f"is among the model's ({', '.join(list(wanted)[:3])}, ...){hint}"
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
        if any(".final_norm." in name for name in extra):
            text += "; build the backbone with taps that end with 'norm' (as heads.published does) to norm its last map"
    else:
        return
    raise ValueError(f"{text}; pass strict=False to load the backbone alone")


def _check_missing(report: Report, classifier: tuple[str, ...], total: int, strict: bool) -> None:
    free: tuple[str, ...] = (FRESH,)
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
    """Prefixes of the parameters that count classes, e.g. ("head.fc.",), also where they are an Identity.

    Those of every head inside the model count: auxiliary heads, the heads of several tasks, a distilled second classifier.
    """
    found: list[nn.Module] = []
    for module in model.modules():
        layer: Any = module.get_classifier() if hasattr(module, "get_classifier") else ()  # type: ignore[operator]
        found += layer if isinstance(layer, (tuple, list)) else [layer]
    names = [name for name, module in model.named_modules(remove_duplicate=False) if any(module is layer for layer in found)]
    stated = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()  # also an auxiliary one
    names += [stated] if isinstance(stated, str) else stated
    return tuple(f"{name}." for name in dict.fromkeys(names)) or ("head.",)


def complete_state_dict(state_dict: dict, model: nn.Module, features: bool = False) -> dict[str, Tensor]:
    """timm's pretrained filter for our models: converted, and refused with a ValueError if a weight of the backbone is absent.

    timm compares names only when the number of classes is the file's; this always does. feature_norms that the file lacks, and
    the final norm if the model will only give features, keep the model's values.
    """
    own, wanted = _choose(state_dict, model, None, "the checkpoint").state, model.state_dict()
    native = _convert(own, model, "the checkpoint")[0]
    kept = FRESH + (r"|norm\." if features else "") + rf"|.*\.{COUNTER}$"
    native |= {name: value for name, value in wanted.items() if name not in native and re.match(kept, name)}
    report = Report("the checkpoint", "pretrained")
    _check_anything_fits(report, native, wanted)
    classifier = classifier_names(model)  # timm's part: dropped when the number of classes differs, else compared strictly
    report.missing = [name for name in wanted if name not in native and not name.startswith(classifier)]
    _check_missing(report, classifier, len(wanted), strict=True)
    if hasattr(model, "adapt"):
        model.adapt(native)  # type: ignore[operator]
    return native


def convert_file(
    model: nn.Module | str,
    source: str | Path,
    destination: str | Path,
    naming: str = "native",
    which: str | None = None,
    **model_args,
) -> Report:
    """Rewrite a checkpoint as safetensors under our names ("native") or the authors' ("official"); returns the load's report.

    Args:
        model: a backbone or its name (`backbones` must have been imported). A named model is built with the file's number of
            classes, without a classifier if the file has none, and with feature_norms if the file has them.
        source: the checkpoint; the heads of a dense-prediction file are left out and reported as unexpected.
        destination: a .safetensors file. Its header says what it was made of and by which versions.
        naming: "native" or "official".
        which: as for load_checkpoint.
        model_args: further arguments of a named model, such as img_size.
    """
    from safetensors.torch import save_file

    if naming not in ("native", "official"):
        raise ValueError(f"naming must be 'native' or 'official', got {naming!r}")
    destination = Path(destination)
    if destination.suffix != ".safetensors":
        raise ValueError(f"a checkpoint is written as .safetensors, got {destination}")
    content = open_checkpoint(source)
    if isinstance(model, str):
        model = _build_for(model, content, model_args, which, str(source))
    report = _load(model, content, str(source), strict=False, which=which)
    target = backbone(model)
    result = {name: value for name, value in target.state_dict().items() if name in set(report.loaded)}
    if naming == "official":
        names = converter(target)
        if names is None:
            raise ValueError(f"the authors' names of timm's {type(target).__name__} are not known here: use naming='native'")
        result = names.to_official(result, target)
    header = {"format": "pt", "source": Path(source).name, "source_format": report.format, "naming": naming} | versions()
    destination.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().contiguous().clone() for name, value in result.items()}, destination, header)
    return report


def versions() -> dict[str, str]:
    """Versions of zoo, torch and timm, as weights files state them in their headers."""
    import timm

    try:
        zoo = metadata.version("backbone-zoo")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        zoo = "unknown"
    return {"zoo": zoo, "torch": str(torch.__version__), "timm": timm.__version__}


def _build_for(name: str, content: dict, model_args: dict, which: str | None, source: str) -> nn.Module:
    """Model `name` without memory (meta device), its classifier and feature norms as the file has them."""
    import timm

    model = timm.create_model(name, **model_args, device="meta")
    found = _choose(content, model, which, source)
    with _one_sentence(source):
        native = to_native(found.state, model)
    rows = [
        value.shape[0]
        for key, value in native.items()
        if key.startswith(classifier_names(model)) and key.endswith("weight") and value.ndim
    ]
    args = {"num_classes": rows[0] if rows else 0}
    if any(re.match(FRESH, key) for key in native):
        args["feature_norms"] = True
    return timm.create_model(name, **(args | model_args), device="meta")
