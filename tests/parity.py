"""Comparisons with the authors' code that a family's tests make: parts and their gradients, small models, published ones."""

from collections.abc import Callable
from types import ModuleType

import golden
import pytest
import timm
import torch
from torch import Tensor, nn

import backbones  # noqa: F401
import weights


def cases_of(prefix: str) -> list:
    """Parameters for pytest: (fixture, case) of the fixtures of parts that start with `prefix`; a skip if there are none."""
    names = [name for name in golden.cases(prefix) if isinstance(name, str)]
    skip = pytest.mark.skip(reason=f"no fixture {prefix}*.json in {golden.folder()}")
    return [(name, case) for name in names for case in golden.load(name)[0]["cases"]] or [pytest.param(None, None, marks=skip)]


def native_names(state: dict[str, Tensor], convert: ModuleType, official: str, native: str) -> dict[str, Tensor]:
    """A part's state dict (or its gradients) under our names; official, native: the part's prefix inside a whole model."""
    whole = convert.to_native({official + key: value for key, value in state.items()}, None)
    return {key.removeprefix(native): value for key, value in whole.items()}


def check_part(
    part: nn.Module,
    fixture: str,
    case: str,
    translate: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    run: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Output, gradient of the input and of every parameter of a part are the stored ones.

    translate: official state dict -> the part's names; run: stored input -> stored output (the part itself unless given).
    """
    info, tensors = golden.load(fixture)
    info = info["cases"][case]
    tolerance = info.get("tolerance_per_tensor", {})

    def close(got: Tensor, expected: Tensor, name: str) -> None:
        atol = tolerance.get(name, info["tolerance"]["atol"])
        torch.testing.assert_close(got, expected, atol=atol, rtol=0, msg=lambda m: f"{case} {name}: {m}")

    part.load_state_dict(translate(golden.state(tensors, f"{case}/state/")), strict=True)
    part.train(info.get("mode", "eval") == "train")
    x = tensors[f"{case}/input"].clone().requires_grad_()
    out = (run or part)(x)
    close(out, tensors[f"{case}/output"], "output")
    out.backward(tensors[f"{case}/grad_output"])
    close(x.grad, tensors[f"{case}/grad_input"], "grad_input")
    got = {name: p.grad for name, p in part.named_parameters()}
    stored = golden.state(tensors, f"{case}/grad_state/")
    for name, value in stored.items():
        for ours, expected in translate({name: value}).items():
            close(got.pop(ours), expected, f"grad_state/{name}")
    assert not [name for name, grad in got.items() if grad is not None and grad.any()], "a gradient that is not stored"


def check_model(
    model: nn.Module, fixture: str, got: Callable[[nn.Module, Tensor], dict[str, Tensor]], ignored: tuple[str, ...] = ()
) -> None:
    """A fixture's state dict loads strictly, converts back to the stored names and values, and every stored tensor appears.

    got: (model, image) -> tensors by the fixture's names; ignored: ends of official names that are rebuilt or unused.
    """
    info, tensors = golden.load(fixture)
    model.eval()
    state = golden.state(tensors)
    model.load_state_dict(weights.convert_state_dict(state, model), strict=True)
    back = weights.convert.converter(model).to_official(model.state_dict(), model)
    assert {key for key in back if not key.endswith(ignored)} == {key for key in state if not key.endswith(ignored)}
    for key, value in back.items():
        assert key.endswith(ignored) or torch.equal(value, state[key]), key
    with torch.no_grad():
        found = got(model, tensors["input"])
    inputs = ("input", "state/", "perm/", "merged/")
    stored = {key: value for key, value in tensors.items() if not key.startswith(inputs)}
    assert stored.keys() <= found.keys(), stored.keys() - found.keys()
    for key, value in stored.items():
        torch.testing.assert_close(found[key], value, **golden.tolerance(info), msg=lambda m, key=key: f"{key}: {m}")


def check_published(
    family: str,
    variant: str,
    name: str,
    ignored: tuple[str, ...] = (),
    uncounted: tuple[str, ...] = (),
    more: int = 0,
    **kwargs,
) -> None:
    """A published full-size model's checkpoint, by names and shapes: it loads strictly and converts back to the same keys.

    Args:
        family, variant: which one, in the lists of keys.
        name, kwargs: our model.
        ignored: ends of official names that are rebuilt or unused.
        uncounted: of those, what the authors count among their parameters.
        more: how many parameters of theirs are no parameters here.
    """
    facts = golden.keys(family)[variant]
    state = {key: torch.empty(shape, device="meta") for key, shape in facts["keys"].items()}
    model = timm.create_model(name, **kwargs, device="meta")
    report = weights.load_checkpoint(model, {"model": {f"module.{key}": value for key, value in state.items()}})
    assert report.format == "official" and not report.missing and not report.unexpected and not report.resized
    extra = more + sum(value.numel() for key, value in state.items() if key.endswith(uncounted))
    assert sum(p.numel() for p in model.parameters()) + extra == facts["params"]
    back = weights.convert.converter(model).to_official(model.state_dict(), model)
    ignored += ("num_batches_tracked",)
    assert {key: list(value.shape) for key, value in back.items() if not key.endswith(ignored)} == {
        key: shape for key, shape in facts["keys"].items() if not key.endswith(ignored)
    }
