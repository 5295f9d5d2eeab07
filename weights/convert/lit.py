"""LIT checkpoints: the authors', of both their networks (LIT-Ti and LIT-S/M/B), classification and dense."""

import re
from typing import Any

from torch import Tensor

from weights.resample import resample_bias_table, resample_position_embedding
from weights.rules import Rules, rename

OFFICIAL: Rules = [  # authors' name -> ours, as regular expressions
    # LIT-S/M/B
    (r"^layers\.(\d)\.downsample\.dconv\.conv_offset\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.offset."),
    (r"^layers\.(\d)\.downsample\.dconv\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.conv."),
    (r"^layers\.(\d)\.downsample\.norm_layer\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.norm."),
    (r"^layers\.(\d)\.(blocks\.\d+\.attn)\.relative_position_bias_table$", r"stages.\1.\2.bias_table"),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"^norm(\d)\.", r"feature_norms.\1."),
    # LIT-Ti
    (r"^patch_embed1\.", "patch_embed."),
    (r"^patch_embed(\d)\.dconv\.conv_offset\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.offset."),
    (r"^patch_embed(\d)\.dconv\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.conv."),
    (r"^patch_embed(\d)\.norm_layer\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.norm."),
    (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.pos_embed"),
    (r"^cls_token$", "stages.3.cls_token"),
]
NATIVE: Rules = [  # ours -> LIT-S/M/B
    (r"^stages\.(\d)\.downsample\.offset\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.dconv.conv_offset."),
    (r"^stages\.(\d)\.downsample\.conv\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.dconv."),
    (r"^stages\.(\d)\.downsample\.norm\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.norm_layer."),
    (r"^stages\.(\d)\.(blocks\.\d+\.attn)\.bias_table$", r"layers.\1.\2.relative_position_bias_table"),
    (r"^stages\.(\d)\.blocks\.", r"layers.\1.blocks."),
    (r"^feature_norms\.(\d)\.", r"norm\1."),
    (r"^head\.fc\.", "head."),
]
NATIVE_TI: Rules = [  # ours -> LIT-Ti
    (r"^patch_embed\.", "patch_embed1."),
    (r"^stages\.(\d)\.downsample\.offset\.", lambda m: f"patch_embed{int(m[1]) + 1}.dconv.conv_offset."),
    (r"^stages\.(\d)\.downsample\.conv\.", lambda m: f"patch_embed{int(m[1]) + 1}.dconv."),
    (r"^stages\.(\d)\.downsample\.norm\.", lambda m: f"patch_embed{int(m[1]) + 1}.norm_layer."),
    (r"^stages\.(\d)\.blocks\.", lambda m: f"block{int(m[1]) + 1}."),
    (r"^stages\.(\d)\.pos_embed$", lambda m: f"pos_embed{int(m[1]) + 1}"),
    (r"^stages\.3\.cls_token$", "cls_token"),
    (r"^head\.fc\.", "head."),
]


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys."""
    keys = set(keys)
    if "pos_embed1" in keys:
        return "official" if "cls_token" in keys else "official-dense"
    if any(key.startswith("layers.") for key in keys):
        return "official-dense" if any(re.match(r"norm\d\.", key) for key in keys) else "official"
    return "native"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    native = {}
    for key, value in state_dict.items():
        if key.endswith("relative_position_index"):
            continue  # follows from the map's size
        key = re.sub(r"^head\.(?:fc\.)?(weight|bias)$", r"head.fc.\1", rename(key, OFFICIAL))
        if key == "stages.3.cls_token" and getattr(model, "class_token", True) is False:
            continue  # the dense network has none
        native[key] = value
    return native


def resize(name: str, value: Tensor, model: Any) -> Tensor:
    """Bias tables and position embeddings for the model's maps, square maps assumed in the file."""
    if not name.endswith(("bias_table", "pos_embed")):
        return value
    rows, columns = model.get_submodule(name.rpartition(".")[0]).size
    if name.endswith("bias_table"):
        return resample_bias_table(value, (2 * rows - 1, 2 * columns - 1))
    prefix = model.get_parameter(name).shape[1] - rows * columns
    return resample_position_embedding(value, (rows, columns), prefix, mode="bilinear")


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    rules = NATIVE_TI if "stages.0.pos_embed" in state_dict else NATIVE
    return {rename(key, rules): value for key, value in state_dict.items()}
