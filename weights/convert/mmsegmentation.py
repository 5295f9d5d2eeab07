"""mmsegmentation 1.2.2's own Swin, MiT and plain ViT -> the names that the converters read.

These are the authors' of Swin and MiT, and timm's of the ViT, which go back too.
"""

import re

import torch
from torch import Tensor

from weights.rules import Rules, rename, rename_all

SWIN: Rules = [
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^stages\.", "layers."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
]
MIT: Rules = [
    (r"^layers\.(\d)\.0\.projection\.", lambda m: f"patch_embed{int(m[1]) + 1}.proj."),
    (r"^layers\.(\d)\.0\.norm\.", lambda m: f"patch_embed{int(m[1]) + 1}.norm."),
    (r"^layers\.(\d)\.1\.", lambda m: f"block{int(m[1]) + 1}."),
    (r"^layers\.(\d)\.2\.", lambda m: f"norm{int(m[1]) + 1}."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ffn\.layers\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.dwconv.dwconv."),
    (r"\.ffn\.layers\.4\.", ".mlp.fc2."),
]
VIT: Rules = [  # a norm behind the last block (final_norm) keeps a name of its own: weights/convert/dense.py
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^ln1\.", "final_norm."),
    (r"^layers\.(\d+)\.ln(\d)\.", r"blocks.\1.norm\2."),
    (r"^layers\.(\d+)\.attn\.attn\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"^layers\.(\d+)\.attn\.attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
]
TIMM_VIT: Rules = [
    (r"^(cls_token|pos_embed)$", r"\1"),
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^norm\.", "ln1."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"layers.\1.ln\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"layers.\1.attn.attn.in_proj_"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"layers.\1.attn.attn.out_proj."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"layers.\1.ffn.layers.0.0."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"layers.\1.ffn.layers.1."),
]


def to_authors(state_dict: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The names of `VIT` and of the authors of Swin and MiT for a file with one of them, bare or behind "backbone."; None for
    other names.
    """
    swin = any(".attn.w_msa." in key for key in state_dict)
    blocks = [re.match(r"(?:backbone\.)?layers\.\d+\.(1\.\d+\.)?attn\.attn\.in_proj_weight$", key) for key in state_dict]
    if not swin and not any(blocks):
        return None
    vit = any(block and not block[1] for block in blocks)
    found: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        prefix = "backbone." if key.startswith("backbone.") else ""
        name = key.removeprefix(prefix)
        if not prefix and key.startswith(("decode_head.", "auxiliary_head.", "neck.")):
            found[key] = value
        elif vit:
            found[prefix + rename(name, VIT)] = value
        elif swin:
            found[prefix + rename_all(name, SWIN)] = merging(name, value)
        else:
            found |= {prefix + new: tensor for new, tensor in mit(name, value).items()}
    return found


def merging(name: str, value: Tensor) -> Tensor:
    """Swin's patch merging: mmsegmentation keeps the four pixels of a channel together, row by row; the authors column by
    column, and the channels of a pixel together."""
    if not re.search(r"\.downsample\.(reduction\.weight|norm\.(weight|bias))$", name) or value.shape[-1] % 4:
        return value
    return value.unflatten(-1, (-1, 4)).mT[..., [0, 2, 1, 3], :].flatten(-2)


def mit(name: str, value: Tensor) -> dict[str, Tensor]:
    """One tensor of MiT: torch's attention as query and key-value layers, 1x1 convolutions as linear layers."""
    if m := re.match(r"(.*\.attn\.)attn\.in_proj_(weight|bias)$", name):
        query, key, content = value.chunk(3) if len(value) % 3 == 0 else (value, value[:0], value[:0])
        stem = rename_all(m[1], MIT)
        return {f"{stem}q.{m[2]}": query, f"{stem}kv.{m[2]}": torch.cat([key, content])}
    if re.search(r"\.ffn\.layers\.[04]\.weight$", name) and value.ndim == 4:
        value = value.flatten(1)
    return {rename_all(name, MIT): value}


def plain_vit(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmsegmentation's names of a plain ViT of timm. ValueError for parts that its ViT does not have."""
    if extra := [key for key in state_dict if rename(key, TIMM_VIT) == key and key not in ("cls_token", "pos_embed")]:
        raise ValueError(f"mmsegmentation's ViT has no place for {extra[0]}")
    if lacking := [key for key in ("cls_token", "pos_embed") if key not in state_dict]:
        raise ValueError(f"mmsegmentation's ViT has a {lacking[0]}, and this model has none")
    return {rename(key, TIMM_VIT): value for key, value in state_dict.items()}
