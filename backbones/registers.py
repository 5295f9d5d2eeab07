"""Registers for vision transformers at test time: an extra token that takes the outlier activations off the patches.

Papers: Darcet et al. 2023, "Vision Transformers Need Registers", https://arxiv.org/abs/2309.16588 (trained registers: timm's
        `vit_*_reg4_dinov2`, used as they are)
        Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", https://arxiv.org/abs/2506.08010
Source: github.com/nickjiang2378/test-time-registers @ 860df43; DINOv2: github.com/facebookresearch/dinov2 @ b8931f7
        (Apache-2.0). Released DINOv2 weights load through weights/convert/registers.py.
Differs from the source: works on any timm ViT and on whole batches (the source edits the first image of a batch only), and
the register stands behind the class token, where timm keeps registers, not at the end. Attention knows no positions, so only
the order of the tokens differs.

    neurons = find_register_neurons(model, images)           # any layer range, images streamed
    add_test_time_registers(model, neurons.top(50))          # in place
    measure_artefacts(model, images, threshold=...)          # before and after, at the same threshold

Shapes: B batch, N tokens, P prefix tokens (class token, registers), R registers added, C channels, K neurons edited in a layer.
A neuron is a hidden unit of an MLP, read after the non-linearity (SwiGLU: after gating), before the last linear layer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timm.models import register_model, register_notrace_function
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from backbones.base import build
from weights.manifest import default_cfgs as _default_cfgs

default_cfgs = _default_cfgs("registers")

RULES = ("code", "paper")
PATCHES = ("zero", "mean", "only_outliers", "same")


class RegisterEdit(nn.Module):
    """Moves the activations of the listed neurons of one layer from the patches to the register tokens, image by image.

    rule "code" (the authors' program): every listed neuron of a register becomes scale * m, m being the activation of largest
    magnitude over all tokens and all listed neurons; then the patches are set to 0 ("zero"), to the neuron's patch mean
    ("mean"), where above mean + 1 std to the mean ("only_outliers"), or left ("same"); other prefix tokens are left. One scale
    serves all registers at once; with one scale for each, a register counts in the m of the next.
    rule "paper" (algorithm 2): each neuron by itself: its maximum over all tokens goes to the registers, 0 to all others.
    """

    def __init__(self, neurons: Sequence[int], first: int, count: int, scale: float | Sequence[float], rule: str, patches: str):
        super().__init__()
        self.indices, self.first, self.count, self.rule, self.patches = list(neurons), first, count, rule, patches
        self.steps = [(first, count, scale)]  # (first register, how many, scale), done in turn
        if not isinstance(scale, int | float):
            self.steps = [(first + i, 1, s) for i, s in enumerate(scale)]
        self.register_buffer("neurons", torch.tensor(self.indices), persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Fill in the indices after the module was made on the meta device."""
        self.neurons = torch.tensor(self.indices, device=self.neurons.device)

    def forward(self, x: Tensor) -> Tensor:  # B N hidden -> B N hidden
        return x.index_copy(2, self.neurons, self.edit(x.index_select(2, self.neurons)))

    def edit(self, x: Tensor) -> Tensor:  # B N K -> B N K
        if self.rule == "paper":
            registers = self.steps_of(x.amax(1, keepdim=True))
            zeros = torch.zeros_like(x)
            return torch.cat([zeros[:, : self.first], registers, zeros[:, self.first + self.count :]], 1)
        for first, count, scale in self.steps:
            high, low = x.amax((1, 2), keepdim=True), x.amin((1, 2), keepdim=True)
            extreme = torch.where(high.abs() > low.abs(), high, low)  # B 1 1
            registers = (scale * extreme).expand(-1, count, x.shape[2])
            x = torch.cat([x[:, :first], registers, x[:, first + count :]], 1)
        kept, patches = x[:, : self.first + self.count], x[:, self.first + self.count :]
        return torch.cat([kept, self.edit_patches(patches)], 1)

    def steps_of(self, x: Tensor) -> Tensor:
        """x, B 1 K, for each register times its scale: B R K."""
        return torch.cat([(scale * x).expand(-1, count, -1) for _, count, scale in self.steps], 1)

    def edit_patches(self, x: Tensor) -> Tensor:
        if self.patches == "zero":
            return torch.zeros_like(x)
        if self.patches == "mean":
            return x.mean(1, keepdim=True).expand_as(x)
        if self.patches == "only_outliers":
            mean = x.mean(1, keepdim=True)
            return torch.where(x > mean + x.std(1, keepdim=True), mean, x)
        return x

    def extra_repr(self) -> str:
        return f"neurons={self.indices}, rule={self.rule!r}, patches={self.patches!r}, steps={self.steps}"


def add_test_time_registers(
    model: nn.Module,
    neurons: Mapping[int, Sequence[int]],
    num_registers: int = 1,
    scale: float | Sequence[float] = 1.0,
    rule: str = "code",
    patches: str = "zero",
) -> nn.Module:
    """Give a timm ViT (VisionTransformer, Eva) `num_registers` tokens of zeros without position, in place; returns the model.

    neurons: layer -> hidden units whose activations they take over (empty: tokens only); scale: of what they receive, one
    number or one for each register; rule, patches: see RegisterEdit. The tokens join timm's `reg_token` and
    `num_prefix_tokens`, so pooling, features_only and forward_intermediates leave them out as they do trained registers. For
    that the class token's entry of the position embedding is added to the class token once and for all, which changes no
    output by a bit, but the state dict: load weights first. Raises ValueError for models and neurons that do not fit.
    """
    blocks = _blocks(model)
    check_rule(rule, patches, scale, num_registers)
    if num_registers < 1:
        raise ValueError(f"num_registers must be at least 1, got {num_registers}")
    if any(isinstance(module, RegisterEdit) for module in model.modules()):
        raise ValueError("this model has test-time registers already")
    if not hasattr(model, "reg_token") or hasattr(model, "dist_token") or not hasattr(model, "no_embed_class"):
        raise ValueError(
            f"{type(model).__name__} keeps no register tokens; models of timm's VisionTransformer and Eva classes do"
        )
    if getattr(model, "pool_include_prefix", False):
        raise ValueError(
            "this model pools over its prefix tokens, so registers would change its output; use another global_pool"
        )
    for layer, units in neurons.items():
        check_neurons(blocks, layer, units)
    _take_prefix_out_of_position_embedding(model)
    first = model.num_prefix_tokens
    trained = model.reg_token
    like = next(p for p in (model.cls_token, trained, model.patch_embed.proj.weight) if p is not None)
    tokens = torch.zeros(1, num_registers, model.embed_dim, device=like.device, dtype=like.dtype)
    tokens = tokens if trained is None else torch.cat([trained.detach(), tokens], 1)
    model.reg_token = nn.Parameter(tokens, requires_grad=like.requires_grad)
    model.num_reg_tokens = tokens.shape[1]
    for module in model.modules():  # Eva's attention and timm's patch dropout count them too
        if hasattr(module, "num_prefix_tokens"):
            module.num_prefix_tokens += num_registers
    for layer, units in neurons.items():
        mlp = blocks[layer].mlp
        edit = RegisterEdit(units, first, num_registers, scale, rule, patches)
        mlp.drop1 = nn.Sequential(edit.to(like.device), mlp.drop1)
    model.test_time_registers = num_registers
    if not hasattr(model, "family"):
        model.family = "registers"  # its checkpoints, also those without registers, load through our converter
    return model


def check_rule(rule: str, patches: str, scale: float | Sequence[float], num_registers: int) -> None:
    """ValueError if the options of RegisterEdit are unknown or contradict each other."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if patches not in PATCHES:
        raise ValueError(f"patches must be one of {', '.join(PATCHES)}, got {patches!r}")
    if rule == "paper" and patches != "zero":
        raise ValueError(f"the paper's rule sets all other tokens to zero; patches={patches!r} needs rule='code'")
    if not isinstance(scale, int | float) and len(scale) != num_registers:
        raise ValueError(f"{num_registers} registers need one scale, or one for each, got {len(scale)}")


def check_neurons(blocks: Sequence[nn.Module], layer: int, units: Sequence[int]) -> None:
    """ValueError if a layer's list of neurons cannot be edited."""
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer {layer} is not in 0..{len(blocks) - 1}")
    hidden = blocks[layer].mlp.fc2.in_features
    if not units or len(set(units)) != len(units) or not all(0 <= unit < hidden for unit in units):
        raise ValueError(f"layer {layer} needs different neurons of 0..{hidden - 1}, at least one, got {list(units)}")


def _blocks(model: nn.Module) -> nn.Sequential:
    """The blocks of a timm ViT; ValueError if their MLPs are not of the kinds whose activation can be read and edited."""
    blocks = getattr(model, "blocks", None)
    if not blocks or not all(hasattr(getattr(block, "mlp", None), "drop1") for block in blocks):
        raise ValueError(
            f"{type(model).__name__} is not a ViT with `blocks[i].mlp` of timm's Mlp, GluMlp or SwiGLU; registers need those"
        )
    return blocks


@torch.no_grad()
def _take_prefix_out_of_position_embedding(model: nn.Module) -> None:
    """Add the position of class and register tokens to the tokens, and keep a position embedding of patches only."""
    if model.pos_embed is not None and not model.no_embed_class and (prefix := model.num_prefix_tokens):
        position, start = model.pos_embed, 0
        for token in (model.cls_token, model.reg_token):
            if token is not None:
                token += position[:, start : start + token.shape[1]]
                start += token.shape[1]
        model.pos_embed = nn.Parameter(position[:, prefix:].clone(), requires_grad=position.requires_grad)
    model.no_embed_class = True


@dataclass
class RegisterNeurons:
    """Neurons ranked by how strongly they fire at outlier tokens.

    neurons: n 2 (layer, neuron), highest score first; scores: n; images: how many had an outlier, of `seen`; threshold: the
    norm above which a token is one.
    """

    neurons: Tensor
    scores: Tensor
    images: int
    seen: int
    threshold: float

    def top(self, count: int) -> dict[int, list[int]]:
        """The first `count` neurons of positive score as layer -> neurons, as add_test_time_registers takes them."""
        found: dict[int, list[int]] = {}
        for (layer, neuron), score in zip(self.neurons[:count].tolist(), self.scores[:count].tolist()):
            if score > 0:
                found.setdefault(layer, []).append(neuron)
        return found


@torch.no_grad()
def find_register_neurons(
    model: nn.Module,
    images: Tensor | Iterable,
    threshold: float | None = None,
    detect_layer: int = -2,
    layers: Iterable[int] | None = None,
    rule: str = "code",
    sparse_share: float | None = None,
    sparse_below: float = 0.5,
    batch_size: int = 8,
) -> RegisterNeurons:
    """Rank the neurons of a timm ViT by their activation at tokens that become outliers on these images (paper, algorithm 1).

    images: n 3 H W, taken `batch_size` at a time, or an iterable of batches (a tensor, a tuple that starts with one, or a
    dictionary with "image"). A token is an outlier if the norm of the output of block `detect_layer` exceeds `threshold`, by
    default mean + 3 std over the patches of all images (then images are read twice); images without one do not count. An
    image's score of a neuron is its mean activation over the outliers, in magnitude (rule "code") or signed ("paper"); with
    sparse_share, 0 unless at least that share of all tokens is below sparse_below (the authors' notebook: 0.5). layers: which
    to rank, default all. The authors' settings for DINOv2-L: threshold 150, layers up to 17, the top 50.

    Each batch runs twice, first for the norms, then for the scores, so memory does not grow with layers or images: one
    layer's activations at a time. Raises ValueError if no image has an outlier.
    """
    blocks = _blocks(model)
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    searched = sorted(set(range(len(blocks)) if layers is None else layers))
    if not searched or not 0 <= searched[0] <= searched[-1] < len(blocks):
        raise ValueError(f"layers must be some of 0..{len(blocks) - 1}, got {searched}")
    if threshold is None:
        if isinstance(images, Iterator):
            raise ValueError("images can be read only once; give a threshold, or a list, DataLoader or tensor of images")
        threshold = measure_artefacts(model, images, detect_layer, batch_size=batch_size).threshold
    scores: dict[int, Tensor] = {}
    seen = used = 0
    largest = 0.0
    for batch in _batches(model, images, batch_size):
        norms = _token_norms(model, batch, detect_layer)
        outliers = norms > threshold
        seen, used = seen + len(batch), used + int(outliers.any(1).sum())
        largest = max(largest, norms.max().item())
        if not outliers.any():
            continue

        def add(module, inputs, layer, outliers=outliers):
            x = outlier_scores(inputs[0], outliers, rule, sparse_share, sparse_below).sum(0).double()
            scores[layer] = scores[layer] + x if layer in scores else x

        hooks = [(blocks[layer].mlp.drop1, partial(add, layer=layer)) for layer in searched]
        _run(model, batch, searched[-1], hooks)
    if not used:
        raise ValueError(f"none of {seen} images has a token with norm above {threshold:g}; the largest is {largest:g}")
    order = [torch.stack([torch.full_like(s, layer), torch.arange(len(s), device=s.device)], 1) for layer, s in scores.items()]
    flat, pairs = torch.cat(list(scores.values())) / used, torch.cat(order).long()
    flat, ranks = flat.sort(descending=True, stable=True)
    return RegisterNeurons(pairs[ranks].cpu(), flat.float().cpu(), used, seen, threshold)


def outlier_scores(x: Tensor, outliers: Tensor, rule: str, sparse_share: float | None, sparse_below: float) -> Tensor:
    """Mean activation at the outlier tokens, by image and neuron; 0 for an image without any.

    x: B N K activations of a layer; outliers: B N bool. Returns B K. See find_register_neurons for the options.
    """
    x = x.float()
    share = outliers / outliers.sum(1, keepdim=True).clamp(min=1)
    scores = torch.einsum("bn,bnk->bk", share.to(x.dtype), x if rule == "paper" else x.abs())
    if sparse_share is not None:
        scores = scores * ((x < sparse_below).float().mean(1) >= sparse_share)
    return scores


@dataclass
class Artefacts:
    """How much a ViT's patches suffer: largest patch norm, share of patches above `threshold`, number of patches measured."""

    largest_norm: float
    outlier_share: float
    threshold: float
    patches: int


@torch.no_grad()
def measure_artefacts(
    model: nn.Module, images: Tensor | Iterable, layer: int = -2, threshold: float | None = None, batch_size: int = 8
) -> Artefacts:
    """Norms of the patch tokens (class token and registers apart) at the output of block `layer`, before any final norm.

    images: as in find_register_neurons. threshold: what counts as an outlier; default mean + 3 std of these norms, the paper's
    heuristic. Compare a model before and after registers at the same threshold, that of before.
    """
    _blocks(model)
    norms = [
        _token_norms(model, batch, layer)[:, model.num_prefix_tokens :].flatten()
        for batch in _batches(model, images, batch_size)
    ]
    if not norms:
        raise ValueError("no images to measure")
    flat = torch.cat(norms)
    if threshold is None:
        threshold = (flat.mean() + 3 * flat.std()).item()
    return Artefacts(flat.max().item(), (flat > threshold).float().mean().item(), threshold, flat.numel())


def _batches(model: nn.Module, images: Tensor | Iterable, batch_size: int) -> Iterator[Tensor]:
    """Batches of images, B 3 H W, where the model is."""
    parameter = next(model.parameters())
    for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
        batch = batch["image"] if isinstance(batch, Mapping) else batch
        batch = batch[0] if isinstance(batch, list | tuple) else batch
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            raise ValueError(f"a batch of images must be a tensor B 3 H W, got {getattr(batch, 'shape', type(batch))}")
        yield batch.to(parameter.device, parameter.dtype)


def _token_norms(model: nn.Module, images: Tensor, layer: int) -> Tensor:
    """Norms of all tokens, prefix included, at the output of block `layer` (negative from the end): B N."""
    count = len(model.blocks)
    if not -count <= layer < count:
        raise ValueError(f"layer {layer} is not in {-count}..{count - 1}")
    norms: list[Tensor] = []
    last = layer % count

    def keep(module, inputs, output):
        norms.append(output.float().norm(dim=-1))

    handle = model.blocks[last].register_forward_hook(keep)
    try:
        _run(model, images, last)
    finally:
        handle.remove()
    return norms[0]


def _run(model: nn.Module, images: Tensor, last: int, hooks: Sequence[tuple] = ()) -> None:
    """The model up to block `last` in evaluation mode, with forward pre-hooks (module, function)."""
    with _evaluation(model):
        handles = [module.register_forward_pre_hook(function) for module, function in hooks]
        try:
            model.forward_intermediates(images, indices=[last], stop_early=True, intermediates_only=True, output_fmt="NLC")
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; the mode of before outside."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.fx.wrap  # both: FX looks only into the module that defines `forward`, which is timm's
@register_notrace_function
def dino_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], antialias: bool, offset: float) -> Tensor:
    """DINOv2's position embedding of patches, 1 (h w) C, resized from grid `old` to `new`; the same tensor if they are equal.

    Bicubic. offset 0: to the new size, as the models with trained registers. Else by the factors (new + offset) / old, which
    are also the steps of the sampling: not quite the same as resizing to the new size.
    """
    if tuple(old) == tuple(new):
        return table
    image = table.float().mT.unflatten(2, old)
    how = {"scale_factor": tuple((n + offset) / o for n, o in zip(new, old))} if offset else {"size": tuple(new)}
    image = F.interpolate(image, mode="bicubic", align_corners=False, antialias=antialias, **how)
    if tuple(image.shape[-2:]) != tuple(new):
        raise ValueError(f"positions of a {old} grid cannot be resized to {new} with offset {offset}")
    return image.flatten(2).mT.to(table.dtype)


class RegisterViT(VisionTransformer):
    """DINOv2's ViT with test-time registers, at any image size: padded to whole patches, positions resized as DINOv2 does.

    register_neurons: layer -> neurons, None for none; num_registers: tokens added at test time; register_scale,
    register_rule, register_patches: see add_test_time_registers; interpolate_antialias, interpolate_offset: of the positions,
    as DINOv2 names them (models with trained registers: True, 0). Other arguments are timm's VisionTransformer's.
    """

    family = "registers"
    default_out_indices = 3  # the last three blocks, as timm's ViTs
    min_size = 1  # pixels; padded to a patch

    def __init__(
        self,
        img_size: int | tuple[int, int] = 518,
        *,
        register_neurons: Mapping[int, Sequence[int]] | None = None,
        num_registers: int = 1,
        register_scale: float | Sequence[float] = 1.0,
        register_rule: str = "code",
        register_patches: str = "zero",
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        **vit,
    ):
        super().__init__(img_size, **{"no_embed_class": True, "dynamic_img_size": True, "dynamic_img_pad": True} | vit)
        self.antialias, self.offset = interpolate_antialias, interpolate_offset
        self.test_time_registers = 0
        if num_registers:
            add_test_time_registers(
                self, register_neurons or {}, num_registers, register_scale, register_rule, register_patches
            )
        elif register_neurons:
            raise ValueError("register_neurons need num_registers of at least 1")

    def resize_positions(self, table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        """A position embedding of patches, 1 (h w) C, for another grid."""
        return dino_positions(table, old, new, self.antialias, self.offset)

    def _pos_embed(self, x: Tensor) -> Tensor:  # B h w C -> B P+hw C
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2) + dino_positions(self.pos_embed, self.patch_embed.grid_size, grid, self.antialias, self.offset)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        return self.pos_drop(torch.cat([*prefix, x], 1))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name in ("pos_embed", "cls_token", "reg_token") if getattr(self, name) is not None}

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Resize the position embedding itself to images of this size, so that no resize is left for run time."""
        old, table = self.patch_embed.grid_size, self.pos_embed
        super().set_input_size(img_size, patch_size)
        table = nn.Parameter(self.resize_positions(table.detach(), old, self.patch_embed.grid_size), table.requires_grad)
        self.pos_embed = table


# The neurons of the authors' released `dinov2_vitl14_tt_reg` (their list, 45 in six layers); none are published for S and B:
# find_register_neurons finds them.
LARGE_NEURONS = {
    12: (3168,),
    13: (2400,),
    14: (2110, 1510, 1082, 2711, 2464, 147, 543, 581),
    15: (1714, 3507, 2492, 2680, 131, 720, 3499, 3062, 2625),
    16: (2301, 3576, 1940, 3463, 1244, 407, 3152, 2517, 3465),
    17: (884, 133, 1427, 3464, 2373, 2436, 841, 3574, 2129, 3355, 4047, 3341, 1330, 4031, 844, 944, 464),
}
DINOV2 = {"patch_size": 14, "init_values": 1e-5}


def _create(name: str, pretrained: bool, **kwargs) -> RegisterViT:
    return build(RegisterViT, name, pretrained, **DINOV2 | kwargs)


@register_model
def vit_small_patch14_ttreg_dinov2(pretrained: bool = False, **kwargs) -> RegisterViT:
    size = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("vit_small_patch14_ttreg_dinov2", pretrained, **size | kwargs)


@register_model
def vit_base_patch14_ttreg_dinov2(pretrained: bool = False, **kwargs) -> RegisterViT:
    size = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("vit_base_patch14_ttreg_dinov2", pretrained, **size | kwargs)


@register_model
def vit_large_patch14_ttreg_dinov2(pretrained: bool = False, **kwargs) -> RegisterViT:
    size = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "register_neurons": LARGE_NEURONS}
    return _create("vit_large_patch14_ttreg_dinov2", pretrained, **size | kwargs)
