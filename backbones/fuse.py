"""Folding for inference: the same outputs up to rounding with fewer passes over the maps, and weights laid out once.

A module that knows a cheaper equal of itself in evaluation defines `fused(self) -> nn.Module`. It works on a copy, so it may
change and return itself; what it returns takes its place and is not searched for further BatchNorms. A module whose branches
end in a scale per channel names them in `layer_scales`: pairs of (the branch's last layer, the scale), attribute names.

What pays and what does not is measured in docs/benchmarks/models.md ("What folding does").
"""

import copy
import functools
import logging
from collections import Counter
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, LayerScale2d, Mlp
from timm.models.vision_transformer import Block as ViTBlock
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

Layer = TypeVar("Layer", bound=nn.Conv2d | nn.Linear)

TIMM_SCALES: dict[type[nn.Module], tuple[tuple[str, str], ...]] = {ViTBlock: (("attn.proj", "ls1"), ("mlp.fc2", "ls2"))}

# Where packed weights beat F.linear on one AVX2 core by more than the noise: `zoo bench linear`. Long inputs amortise what the
# library does with the weights at every call, and one to a few rows are bound by reading them once.
LEAST_ROWS, MOST_ROWS = 8, 320
LEAST_WEIGHTS = 1 << 17


def fuse(model: nn.Module, keep: bool = True) -> nn.Module:
    """A copy of `model` for inference, in evaluation mode, with equal outputs up to rounding; the model itself is not changed.

    Folded: modules with a `fused` method (merged norms, activations), in every nn.Sequential a BatchNorm that follows a
    convolution or linear layer, and scales per channel at the end of a branch. Activations inside an MLP work in place, and on
    a CPU in float32 wide linear layers keep a second, packed copy of their weights, made at the first call of few rows. These
    two hold without gradients; with them, under torch.compile, torch.fx and torch.export, the layers are ordinary ones.

    keep: the copy holds the model it was made from, which `unfuse` returns; False lets it go, as memory may ask.

    Its attribute `fusion` counts what was done, in words. A BatchNorm without running statistics stays. Parameter names differ
    from the model's: load weights first, then fuse.
    """
    done: Counter[str] = Counter()
    plain = unfuse(model) if "_unfused" in model.__dict__ else model
    fused: Any = _fused(copy.deepcopy(plain).eval(), done)
    for module in list(fused.modules()):
        _fold_scales(module, done)
        _work_in_place(module, done)
    fused = _pack(fused, done, {})
    fused.fusion = dict(done)
    if keep:
        fused.__dict__["_unfused"] = plain  # not a submodule: its weights are not the copy's
    _logger.info("fused %s: %s", type(model).__name__, said(fused.fusion) or "nothing to fold")
    return fused


def unfuse(model: nn.Module) -> nn.Module:
    """The model that `fuse` made this one from. Raises ValueError if it was not fused, or not kept."""
    if "_unfused" not in model.__dict__:
        reason = "it was fused with keep=False" if hasattr(model, "fusion") else "backbones.fuse did not make it"
        raise ValueError(f"this {type(model).__name__} cannot be unfused: {reason}")
    return model.__dict__["_unfused"]


def said(fusion: dict[str, int]) -> str:
    """What `fuse` did, as a sentence's end."""
    return ", ".join(f"{count} {what}" for what, count in fusion.items())


def fold_batch_norm(layer: Layer, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Layer:
    """`layer` with the BatchNorm that follows it folded in, changed in place: norm(layer(x)) in evaluation, one pass less."""
    bias = torch.zeros(norm.num_features, device=layer.weight.device) if layer.bias is None else layer.bias
    weight, bias = folded(layer.weight, bias, norm)
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    return layer


@torch.no_grad()
def folded(weight: Tensor, bias: Tensor, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(weight, bias) of a layer with a BatchNorm folded in; output channels are the weight's first axis.

    In float64, so that the only rounding is the one back to the weight's type. Raises ValueError if the BatchNorm has no
    running statistics: what it does then depends on the batch.
    """
    if norm.running_var is None or norm.running_mean is None:
        raise ValueError("this BatchNorm has no running statistics (track_running_stats=False) and cannot be folded")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        shift = shift + norm.bias.double()
    new_weight = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return new_weight.to(weight.dtype), (bias.double() * scale + shift).to(weight.dtype)


class PackedLinear(nn.Linear):
    """A linear layer that keeps its weights as oneDNN wants them and uses that copy for inputs of few rows.

    The copy is made again when the weights have changed. It is for float32 on a CPU without gradients; any other call, and any
    tracer or compiler, meets an ordinary linear layer.
    """

    _packed: Tensor | None = None
    _packed_from: tuple[int, int] | None = None

    @classmethod
    def of(cls, layer: nn.Linear) -> "PackedLinear":
        """With the layer's own weights."""
        packed = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        packed.weight, packed.bias = layer.weight, layer.bias
        return packed.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:  # ... C -> ... D
        if (
            type(x) is Tensor  # no stand-in of a tracer
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and x.dtype == self.weight.dtype == torch.float32
            and x.device.type == self.weight.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and LEAST_ROWS <= x.numel() // self.in_features <= MOST_ROWS
        ):
            return torch.ops.mkldnn._linear_pointwise(x, self.packed(), self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def packed(self) -> Tensor:
        """The packed copy of the weights as they are now."""
        version = 0 if self.weight.is_inference() else self.weight._version
        now = (self.weight.data_ptr(), version)
        if self._packed is None or self._packed_from != now:
            self._packed, self._packed_from = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach()), now
        return self._packed

    def __getstate__(self) -> dict[str, Any]:  # a copy, or a file, packs its own
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_packed")}


class InPlaceGELU(nn.GELU):
    """Exact GELU that overwrites its input where no gradient is asked for: a large map costs no second one."""

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return torch.ops.aten.gelu_(x)
        return F.gelu(x)


def _fused(module: nn.Module, done: Counter[str]) -> nn.Module:
    """`module` with everything in it replaced that has a cheaper equal of its own or a BatchNorm to fold."""
    fused = getattr(module, "fused", None)
    if fused is not None:
        done["modules in their own cheaper form"] += 1
        return fused()
    for name, child in module.named_children():
        setattr(module, name, _fused(child, done))
    return _fold_sequence(module, done) if type(module) is nn.Sequential else module


def _fold_sequence(sequence: nn.Sequential, done: Counter[str]) -> nn.Sequential:
    """BatchNorms become Identity, so that the indices of what follows stay."""
    for i in range(1, len(sequence)):
        layer, norm = sequence[i - 1], sequence[i]
        pairs = ((nn.Conv2d, nn.BatchNorm2d), (nn.Linear, nn.BatchNorm1d))
        # exact types: a transposed convolution has its output channels elsewhere, timm's BatchNorms add an activation
        if (type(layer), type(norm)) in pairs and norm.running_var is not None:
            assert isinstance(layer, (nn.Conv2d, nn.Linear)) and isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
            sequence[i - 1], sequence[i] = fold_batch_norm(layer, norm), nn.Identity()
            done["batch norms folded"] += 1
    return sequence


@torch.no_grad()
def _fold_scales(module: nn.Module, done: Counter[str]) -> None:
    """Scales per channel at the end of a branch go into the weights of its last layer."""
    for last, name in getattr(module, "layer_scales", TIMM_SCALES.get(type(module), ())):
        scale, layer = getattr(module, name), module.get_submodule(last)
        if not isinstance(scale, (LayerScale, LayerScale2d)) or type(layer) not in (nn.Linear, nn.Conv2d):
            continue
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        gamma = scale.gamma.detach().to(layer.weight)
        layer.weight = nn.Parameter(layer.weight * gamma.reshape(-1, *[1] * (layer.weight.ndim - 1)), False)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias * gamma, False)
        setattr(module, name, nn.Identity())
        done["layer scales folded"] += 1


def _work_in_place(module: nn.Module, done: Counter[str]) -> None:
    """The activation of an MLP overwrites what the layer before it has made."""
    if not isinstance(module, Mlp) or type(module).forward is not Mlp.forward:
        return
    act: Any = module.act
    if type(act) is nn.GELU and act.approximate == "none":
        module.act = InPlaceGELU()
    elif isinstance(act, (nn.ReLU, nn.SiLU)):
        act.inplace = True
    else:
        return
    done["activations in place"] += 1


def _pack(module: nn.Module, done: Counter[str], seen: dict[nn.Linear, PackedLinear]) -> nn.Module:
    """`module` with its wide linear layers replaced by PackedLinear; a layer that stands in two places stays one."""
    if type(module) is nn.Linear:
        fits = module.weight.numel() >= LEAST_WEIGHTS and module.weight.dtype == torch.float32
        if not (fits and torch.backends.mkldnn.is_available() and _pointwise()):
            return module
        if module not in seen:
            seen[module] = PackedLinear.of(module)
            done["linear layers with packed weights"] += 1
        return seen[module]
    for name, child in module.named_children():
        setattr(module, name, _pack(child, done, seen))
    return module


@functools.cache
def _pointwise() -> bool:
    """Whether this torch has the operator of packed weights; tells torch's counter of operations how to count it."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    def count(x: Any, weight: Any, *_: Any, out_shape: Any = None, **others: Any) -> int:
        rows = 1
        for side in out_shape[:-1]:
            rows *= side
        return 2 * rows * x[-1] * out_shape[-1]

    if torch.ops.mkldnn._linear_pointwise not in flop_registry:
        register_flop_formula(torch.ops.mkldnn._linear_pointwise)(count)
    return True
