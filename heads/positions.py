"""How published dense models on plain ViTs resize their positions for images of another size than they were trained at.

timm resizes a position embedding bicubically with antialiasing, and binds a BEiT to one size. The authors of DPT, MiDaS,
Depth-Anything and mmsegmentation do otherwise, and their depth maps differ at every size but the native one. `follow(model,
rule)` makes a timm model keep its authors' rule; names and shapes of its weights do not change.

Shapes: B batch, h w grid of patches, N tokens, C channels, P prefix tokens (class token, registers).
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Attention, Beit, gen_relative_position_index
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

RULES = ("dpt", "dinov2", "mmsegmentation")


def follow(model: Any, rule: str) -> Any:
    """Resize the positions of a timm VisionTransformer or Beit by `rule` from now on, in place; returns the model.

    rule: "dpt" (DPT, MiDaS: bilinear; in a BEiT the table of offsets of every block), "dinov2" (DINOv2, Depth-Anything:
    bicubic, by the factors (n + 0.1) / native grid) or "mmsegmentation" (bicubic, without antialiasing). Raises ValueError for
    another rule and for a model without such positions.
    """
    if rule not in RULES:
        raise ValueError(f"positions is {rule!r}; use one of {', '.join(RULES)}, or null for timm's own rule")
    if type(model) in (VisionTransformer, PlainViT):
        # the class is changed in place because timm builds a model by its name alone, and only one method differs
        model.__class__ = PlainViT
        model.position_rule = rule
    elif type(model) in (Beit, AnySizeBeit) and rule == "dpt" and model.pos_embed is None and model.rel_pos_bias is None:
        model.__class__ = AnySizeBeit
        model.patch_embed.strict_img_size = False
        for block in model.blocks:
            block.attn.__class__, block.attn.grid, block.attn.index = AnySizeAttention, None, None
    else:
        also = " and for BEiTs with relative positions in every block" if rule == "dpt" else ""
        raise ValueError(f"positions {rule!r} is for timm's VisionTransformer{also}, not for {type(model).__name__}")
    return model


class PlainViT(VisionTransformer):
    """timm's VisionTransformer with its authors' resizing of positions, at run time (dynamic_img_size) and on loading."""

    position_rule: str

    def resize_positions(self, table: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
        """A position embedding of patches, 1 (h w) C, of grid `old` for grid `new`; the same tensor if they are equal."""
        if tuple(old) == tuple(new):
            return table
        image = table.float().mT.unflatten(2, tuple(old))
        if self.position_rule != "dinov2":
            mode = "bilinear" if self.position_rule == "dpt" else "bicubic"
            image = F.interpolate(image, tuple(new), mode=mode, align_corners=False)
        else:  # the factors are also the steps of the sampling, which is not quite resizing to the new size
            factors = tuple((n + 0.1) / o for n, o in zip(new, old, strict=True))
            image = F.interpolate(image, scale_factor=factors, mode="bicubic", align_corners=False)
        return image.flatten(2).mT.to(table.dtype)

    def _pos_embed(self, x: Tensor) -> Tensor:  # B h w C -> B P+hw C
        if self.pos_embed is None or not self.dynamic_img_size:
            return super()._pos_embed(x)
        count = 0 if self.no_embed_class else self.num_prefix_tokens
        old, new = self.patch_embed.grid_size, x.shape[1:3]
        table = torch.cat([self.pos_embed[:, :count], self.resize_positions(self.pos_embed[:, count:], old, new)], 1)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = x.flatten(1, 2)
        x = torch.cat([*prefix, x + table], 1) if self.no_embed_class else torch.cat([*prefix, x], 1) + table
        return self.pos_drop(x)


class AnySizeBeit(Beit):
    """timm's Beit at any multiple of its patches: every block resizes its table of offsets bilinearly, as MiDaS does."""

    position_rule = "dpt"

    def forward_features(self, x: Tensor) -> Tensor:
        self.set_grid(x)
        return super().forward_features(x)

    @functools.wraps(Beit.forward_intermediates)  # its signature says that it can return prefix tokens
    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # timm's arguments, all passed on
        self.set_grid(x)
        return super().forward_intermediates(x, *args, **kwargs)

    def set_grid(self, images: Tensor) -> None:
        """Tell every block the grid of these images: a block sees tokens only, and 6 x 4 and 4 x 6 are both 24."""
        grid = self.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        native = tuple(grid) == tuple(self.patch_embed.grid_size)
        index = None if native else gen_relative_position_index(grid, device=images.device)
        for attn in (module for module in self.modules() if isinstance(module, AnySizeAttention)):
            attn.grid, attn.index = None if native else grid, index


class AnySizeAttention(Attention):
    """timm's attention of BEiT with the bias of another grid, where one is set."""

    grid: tuple[int, int] | None
    index: Tensor | None  # (1 + h w) (1 + h w), entries of the table

    def _get_rel_pos_bias(self) -> Tensor:  # 1 heads N N
        if self.grid is None or self.index is None:
            return super()._get_rel_pos_bias()
        old, new = ([2 * side - 1 for side in sides] for sides in (self.window_size, self.grid))
        table: Tensor = self.relative_position_bias_table
        offsets = table[:-3].T.unflatten(1, old)[None]  # the last three entries are the class token's
        offsets = F.interpolate(offsets.float(), new, mode="bilinear", align_corners=False)[0].flatten(1).T
        table = torch.cat([offsets.to(table.dtype), table[-3:]])
        return table[self.index].permute(2, 0, 1)[None]
