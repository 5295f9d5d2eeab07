"""Test-time registers: an extra token that takes the outlier activations off the patches of any timm ViT.

Paper:  Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", https://arxiv.org/abs/2506.08010
Source: github.com/nickjiang2378/test-time-registers @ 860df43
Differs from the source: works on any timm ViT and on whole batches (the source edits the first image of a batch only), and
the register stands behind the class token, where timm keeps registers, not at the end. Attention knows no positions, so only
the order of the tokens differs.

Shapes: B batch, N tokens, P prefix tokens (class token, registers), R registers added, C channels, K neurons edited in a layer.
A neuron is a hidden unit of an MLP, read after the non-linearity (SwiGLU: after gating), before the last linear layer.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from backbones.vit import Part

RULES = ("code", "paper")
PATCHES = ("zero", "mean", "only_outliers", "same")


class RegisterEdit(nn.Module):
    """Moves the activations of the listed neurons of one layer from the patches to the register tokens, image by image.

    rule "code" (the authors' program): every listed neuron of a register becomes scale * m, m being the activation of largest
    magnitude over all tokens and all listed neurons; then the patches are set to 0 ("zero"), to the neuron's patch mean
    ("mean"), where above mean + 1 std to the mean ("only_outliers"), or left ("same"); other prefix tokens are left. One scale
    serves all registers at once; with one scale for each, a register counts in the m of the next.
    rule "paper" (algorithm 2): each neuron by itself: its maximum over all tokens goes to the registers, 0 to all others.

    Args:
        neurons: of the layer.
        first: place of the first register among the tokens.
        count: number of registers.
        scale: of what a register gets, one number or one for each register.
        rule: "code" or "paper".
        patches: "zero", "mean", "only_outliers" or "same".
    """

    def __init__(self, neurons: Sequence[int], first: int, count: int, scale: float | Sequence[float], rule: str, patches: str):
        super().__init__()
        self.neurons: Tensor
        self.indices, self.first, self.count, self.rule, self.patches = list(neurons), first, count, rule, patches
        scales = [scale] if isinstance(scale, int | float) else scale
        each = count if isinstance(scale, int | float) else 1
        self.steps = [(first + i * each, each, s) for i, s in enumerate(scales)]  # (first register, how many, scale), in turn
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
    model: Part,
    neurons: Mapping[int, Sequence[int]] | None = None,
    num_registers: int = 1,
    scale: float | Sequence[float] = 1.0,
    rule: str = "code",
    patches: str = "zero",
) -> nn.Module:
    """Give a timm ViT (VisionTransformer, Eva) `num_registers` tokens of zeros without position, in place; returns the model.

    The tokens join timm's `reg_token` and `num_prefix_tokens`, so pooling, features_only and forward_intermediates leave them
    out as they do trained registers. For that the class token's entry of the position embedding is added to the class token
    once and for all, which changes no output by a bit, but the state dict: load weights first. Raises ValueError for models
    and neurons that do not fit.

    Args:
        model: changed in place.
        neurons: layer -> hidden units whose activations the registers take over; empty: tokens only.
        num_registers: tokens to add.
        scale: of what they receive, one number or one for each register.
        rule: "code" or "paper", see RegisterEdit.
        patches: what rule "code" leaves on the patches: "zero", "mean", "only_outliers" or "same".
    """
    neurons = {int(layer): units for layer, units in (neurons or {}).items()}  # JSON spells the keys as text
    blocks = mlp_blocks(model)
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
    if any(hasattr(module, "rpe_skip") for module in model.modules()):
        raise ValueError("relative positions are laid out for the tokens there are: add registers before irpe")
    for layer, units in neurons.items():
        check_neurons(blocks, layer, units)
    if len({id(blocks[layer].mlp) for layer in neurons}) < len(neurons):
        raise ValueError("two of these layers repeat the same block and share its MLP: name it once")
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
        mlp: Part = blocks[layer].mlp
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


def check_neurons(blocks: nn.Sequential, layer: int, units: Sequence[int]) -> None:
    """ValueError if a layer's list of neurons cannot be edited."""
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer {layer} is not in 0..{len(blocks) - 1}")
    mlp: Part = blocks[layer].mlp
    hidden = mlp.fc2.in_features
    if not units or len(set(units)) != len(units) or not all(0 <= unit < hidden for unit in units):
        raise ValueError(f"layer {layer} needs different neurons of 0..{hidden - 1}, at least one, got {list(units)}")


def mlp_blocks(model: Part) -> nn.Sequential:
    """The blocks of a timm ViT; ValueError if their MLPs are not of the kinds whose activation can be read and edited."""
    blocks = getattr(model, "blocks", None)
    if not blocks or not all(hasattr(getattr(block, "mlp", None), "drop1") for block in blocks):
        raise ValueError(
            f"{type(model).__name__} is not a ViT with `blocks[i].mlp` of timm's Mlp, GluMlp or SwiGLU; registers need those"
        )
    return blocks


@torch.no_grad()
def _take_prefix_out_of_position_embedding(model: Part) -> None:
    """Add the position of class and register tokens to the tokens, and keep a position embedding of patches only."""
    if model.pos_embed is not None and not model.no_embed_class and (prefix := model.num_prefix_tokens):
        position, start = model.pos_embed, 0
        for token in (model.cls_token, model.reg_token):
            if token is not None:
                token += position[:, start : start + token.shape[1]]
                start += token.shape[1]
        model.pos_embed = nn.Parameter(position[:, prefix:].clone(), requires_grad=position.requires_grad)
    model.no_embed_class = True
