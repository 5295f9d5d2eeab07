"""Hugging Face's names (transformers 4 and 5) -> the authors', which the converters read. NAT and CvT have own rules.

Read: Swin, PoolFormer, DINOv2 (also with registers), BEiT, ViT, PVTv2, SegFormer's MiT; and whole DPT, Depth-Anything (1, 2),
GLPN, UperNet on Swin and SegFormer. transformers 5 renamed modules; files on the hub have the older names: both are read.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from weights.rules import Rules, rename_all

READ = "Swin, PoolFormer, DINOv2, BEiT, ViT, PVTv2, SegFormer, DPT, Depth-Anything, GLPN, UperNet on Swin, NAT, DiNAT, CvT"
MARKS = r"(^|\.)(embeddings\.(patch_embeddings|position_embeddings|cls_token)|encoder\.layer\.\d|attention\.(self|attention)\.)"


def next_number(pattern: str, step: int = 1) -> Callable[[re.Match], str]:
    """The replacement `pattern` with {0} standing for the first group plus `step`."""
    return lambda m: m.expand(pattern.replace("{0}", str(int(m[1]) + step)))


# Every rule in turn. Query, key and value are made one first, as "qkv" or as "q" and "kv".
TRANSFORMER: Rules = [  # ViT, BEiT, DINOv2
    (r"^(?:vit|beit|dinov2|dinov2_with_registers|dpt|deit)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),  # cls_token, mask_token, register_tokens
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.attention\.(?:attention|self)\.", r"\1.attention."),
    (r"^(blocks\.\d+)\.attention\.(?:output\.dense|o_proj)\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+\.)(?:attention\.)?relative_position_bias\.", r"\1attn."),
    (r"^(blocks\.\d+)\.attention\.", r"\1.attn."),
    (r"^(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.layer_scale(\d)\.lambda1$", r"\1.ls\2.gamma"),
    (r"^(blocks\.\d+)\.lambda_(\d)$", r"\1.gamma_\2"),
    (r"^(blocks\.\d+\.mlp)\.weights_in\.", r"\1.w12."),
    (r"^(blocks\.\d+\.mlp)\.(?:weights_out|down_proj)\.", r"\1.w3."),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^classifier\.", "head."),
]
SWIN: Rules = [
    (r"^swin\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.position_embeddings$", "absolute_pos_embed"),
    (r"^encoder\.", ""),
    (r"\.attention\.self\.", ".attention."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:relative_position_bias\.)?", ".attn."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^hidden_states_norms\.stage(\d+)\.", next_number("norm{0}.", -1)),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
]
POOLFORMER: Rules = [
    (r"^poolformer\.", ""),
    (r"^encoder\.patch_embeddings\.0\.projection\.", "patch_embed.proj."),
    (r"^encoder\.patch_embeddings\.(\d)\.projection\.", lambda m: f"network.{2 * int(m[1]) - 1}.proj."),
    (r"^encoder\.block\.(\d)\.", lambda m: f"network.{2 * int(m[1])}."),
    (r"\.before_norm\.", ".norm1."),
    (r"\.after_norm\.", ".norm2."),
    (r"\.output\.conv(\d)\.", r".mlp.fc\1."),
    (r"^classifier\.", "head."),
]
PYRAMID: Rules = [  # PVTv2, and MiT inside SegFormer and GLPN: the names of PVTv2's and SegFormer's authors
    (r"^(?:pvt_v2|segformer|glpn)\.", ""),
    (r"^(?:encoder\.layers|stages)\.(\d)\.patch_embeddings?\.(?:patch_embeddings\.)?", next_number("patch_embed{0}.")),
    (r"^encoder\.patch_embeddings\.(\d)\.", next_number("patch_embed{0}.")),
    (r"^(patch_embed\d)\.layer_norm\.", r"\1.norm."),
    (r"^(?:encoder\.layers|stages)\.(\d)\.blocks\.", next_number("block{0}.")),
    (r"^encoder\.block\.(\d)\.", next_number("block{0}.")),
    (r"^(?:encoder\.layers|stages)\.(\d)\.layer_norm\.", next_number("norm{0}.")),
    (r"^encoder\.layer_norm\.(\d)\.", next_number("norm{0}.")),
    (r"\.attention\.self\.", ".attention."),
    (r"\.attention\.(?:sequence_reduction\.)?layer_norm\.", ".attn.norm."),
    (r"\.attention\.(?:sequence_reduction\.)?(?:sequence_reduction|spatial_reduction|sr)\.", ".attn.sr."),
    (r"\.attention\.(?:output\.dense|o_proj|proj)\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.(?:layer_norm_1|layernorm_before)\.", ".norm1."),
    (r"\.(?:layer_norm_2|layernorm_after)\.", ".norm2."),
    (r"\.mlp\.dense(\d)\.", r".mlp.fc\1."),
    (r"^classifier\.", "head."),
]
FUSION: Rules = [
    (r"^neck\.convs\.(\d)\.", next_number("scratch.layer{0}_rn.")),
    (r"^neck\.fusion_stage\.layers\.(\d)\.", lambda m: f"scratch.refinenet{4 - int(m[1])}."),  # counts from the coarsest
    (r"(refinenet\d)\.projection\.", r"\1.out_conv."),
    (r"(refinenet\d)\.residual_layer(\d)\.convolution(\d)\.", r"\1.resConfUnit\2.conv\3."),
    (r"(refinenet\d)\.residual_layer(\d)\.batch_norm(\d)\.", r"\1.resConfUnit\2.bn\3."),
]
DPT: Rules = [
    (r"^neck\.reassemble_stage\.layers\.(\d)\.projection\.", next_number("pretrained.act_postprocess{0}.3.")),
    (r"^neck\.reassemble_stage\.layers\.(\d)\.resize\.", next_number("pretrained.act_postprocess{0}.4.")),
    (r"^neck\.reassemble_stage\.readout_projects\.(\d)\.0\.", next_number("pretrained.act_postprocess{0}.0.project.0.")),
    *FUSION,
    (r"^head\.head\.", "scratch.output_conv."),
    (r"^auxiliary_head\.head\.", "auxlayer."),
]
DEPTH_ANYTHING: Rules = [
    (r"^neck\.reassemble_stage\.layers\.(\d)\.projection\.", r"projects.\1."),
    (r"^neck\.reassemble_stage\.layers\.(\d)\.resize\.", r"resize_layers.\1."),
    (r"^neck\.reassemble_stage\.readout_projects\.(\d)\.0\.", r"readout_projects.\1.0."),
    *FUSION,
    (r"^head\.conv1\.", "scratch.output_conv1."),
    (r"^head\.conv2\.", "scratch.output_conv2.0."),
    (r"^head\.conv3\.", "scratch.output_conv2.2."),
]
GLPN: Rules = [
    (r"^decoder\.stages\.0\.convolution\.", "decoder.bot_conv."),
    (r"^decoder\.stages\.(\d)\.convolution\.", r"decoder.skip_conv\1."),
    (r"^decoder\.stages\.(\d)\.fusion\.convolutional_layer(\d)\.", r"decoder.fusion\1.conv\2."),
    (r"^head\.head\.", "last_layer_depth."),
]
UPERNET: Rules = [(r"\.batch_norm\.", ".bn."), (r"head\.classifier\.", "head.conv_seg.")]
SEGFORMER: Rules = [
    (r"^decode_head\.(?:linear_c|linear_projections)\.(\d)\.proj\.", r"decode_head.convs.\1.conv."),
    (r"^decode_head\.linear_fuse\.", "decode_head.fusion_conv.conv."),
    (r"^decode_head\.batch_norm\.", "decode_head.fusion_conv.bn."),
    (r"^decode_head\.classifier\.", "decode_head.conv_seg."),
]
QKV = r"(.*\.attention\.(?:attention\.|self\.)?)(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)$"


def to_authors(state_dict: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The authors' names of a file with Hugging Face's; None for other names, and for a family that is not read."""
    keys = list(state_dict)
    if any(key.startswith("neck.reassemble_stage.") for key in keys):
        anything = "head.conv1.weight" in state_dict
        encoder, head = split(state_dict, ("neck.", "head.", "auxiliary_head."))
        encoder = backbone({key.removeprefix("backbone."): value for key, value in encoder.items()}) or {}
        prefix, place = ("pretrained.", "depth_head.") if anything else ("pretrained.model.", "")
        unused = r"refinenet4\.resConfUnit1\."
        head = renamed(head, DEPTH_ANYTHING if anything else DPT)
        head = {place + name: value for name, value in head.items() if not re.search(unused, name)}
        return {prefix + name: value for name, value in encoder.items()} | head
    if "decode_head.linear_fuse.weight" in state_dict:
        encoder, head = split(state_dict, ("decode_head.",))
        return {f"backbone.{name}": value for name, value in (backbone(encoder) or {}).items()} | segformer(head)
    if any(key.startswith("decode_head.psp_modules.") and ".batch_norm." in key for key in keys):
        encoder, head = split(state_dict, ("decode_head.", "auxiliary_head."))
        found = backbone({key.removeprefix("backbone."): value for key, value in encoder.items()}) or {}
        return {f"backbone.{name}": value for name, value in found.items()} | renamed(head, UPERNET)
    if any(key.startswith("decoder.stages.") and ".fusion." in key for key in keys):
        encoder, head = split(state_dict, ("decoder.", "head."))
        head = {key: value for key, value in head.items() if not key.startswith("decoder.stages.0.fusion.")}  # never run
        return {f"encoder.{name}": value for name, value in (backbone(encoder) or {}).items()} | renamed(head, GLPN)
    return backbone(state_dict)


def backbone(state_dict: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The authors' names of an encoder; None if it is of no family that is read."""
    keys = list(state_dict)

    def has(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in keys)

    if has(r"^(swin\.)?encoder\.layers\.\d+\.blocks\.\d+\.(attention|layernorm_before)\."):
        return renamed(joined(state_dict, "qkv"), SWIN)
    if has(r"^(poolformer\.)?encoder\.block\.\d+\.\d+\.before_norm\."):
        return renamed(state_dict, POOLFORMER)
    if has(r"(^|\.)(encoder\.layers|stages)\.\d+\.(patch_embedding|patch_embeddings)\.proj\.") or has(
        r"(^|\.)encoder\.block\.\d+\.\d+\.layer_norm_1\."
    ):
        return renamed(joined(state_dict, "kv"), PYRAMID)
    if has(r"(^|\.)embeddings\.cls_token$") and has(r"(^|\.)layers?\.\d+\.(norm1|layernorm_before)\."):
        beit = has(r"\.lambda_1$")
        return gated(renamed(joined(state_dict, "qkv", separate_bias=beit), TRANSFORMER))
    return None


def split(state_dict: dict[str, Tensor], heads: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(encoder, what starts with one of `heads`)."""
    inside = {key: value for key, value in state_dict.items() if key.startswith(heads)}
    return {key: value for key, value in state_dict.items() if key not in inside}, inside


def renamed(state_dict: dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Every rule applied in turn to every name; index buffers are left out."""
    found = {}
    for key, value in state_dict.items():
        if key.endswith(("relative_position_index", "relative_coords_table")):
            continue
        found[rename_all(key, rules)] = value
    return found


def joined(state_dict: dict[str, Tensor], what: str, separate_bias: bool = False) -> dict[str, Tensor]:
    """Query, key and value as one "qkv", or as "q" and one "kv". separate_bias: q_bias and v_bias stay alone (BEiT)."""
    found: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        if m := re.match(QKV, key):
            parts.setdefault((m[1], m[3]), {})[m[2][0]] = value
        else:
            found[key] = value
    for (stem, kind), part in parts.items():
        if separate_bias and kind == "bias":
            found |= {f"{stem}{letter}_bias": value for letter, value in part.items() if letter != "k"}
        elif not all(letter in part for letter in "qkv"):
            found |= {f"{stem}{letter}.{kind}": value for letter, value in part.items()}  # incomplete: reported as unknown
        elif what == "qkv":
            found[f"{stem}qkv.{kind}"] = torch.cat([part[letter] for letter in "qkv"])
        else:
            found[f"{stem}q.{kind}"] = part["q"]
            found[f"{stem}kv.{kind}"] = torch.cat([part[letter] for letter in "kv"])
    return found


def gated(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's gated MLP: gate and value projection as one, the gate first."""
    found = dict(state_dict)
    for key in [key for key in found if ".mlp.gate_proj." in key]:
        up = key.replace("gate_proj", "up_proj")
        if up in found:
            found[key.replace("gate_proj", "w12")] = torch.cat([found.pop(key), found.pop(up)])
    return found


def segformer(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """SegFormer's head: linear layers as 1x1 convolutions, and the maps of the mixing layer finest first instead of last."""
    found = renamed(head, SEGFORMER)
    levels = len([name for name in found if re.fullmatch(r"decode_head\.convs\.\d\.conv\.weight", name)])
    for name, value in found.items():
        if re.fullmatch(r"decode_head\.convs\.\d\.conv\.weight", name) and value.ndim == 2:
            found[name] = value[:, :, None, None]
    name = "decode_head.fusion_conv.conv.weight"
    if name in found and levels and found[name].shape[1] % levels == 0:
        found[name] = torch.cat(found[name].chunk(levels, 1)[::-1], 1)
    return found
