"""Whole dense-prediction files -> a `heads.DensePredictor`: backbone, head and auxiliary head, each by its own converter.

Formats: mmsegmentation (backbone., neck., decode_head., auxiliary_head.), isl-org's DPT and MiDaS (pretrained., scratch.),
Depth-Anything-V2 (pretrained., depth_head.), GLPN (encoder., decoder., last_layer_depth.), detectron2's of Mask2Former and
kMaX-DeepLab (backbone., sem_seg_head.).
"""

import importlib
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from weights import convert
from weights.resample import dino_positions, resample_bias_table, resample_position_embedding, square

FORMATS = {  # name -> (a name that only this format has, what its backbone's names start with)
    "mmsegmentation": (r"decode_head\.", "backbone."),
    "isl": (r"scratch\.(layer|refinenet)", "pretrained.model."),
    "depth-anything": (r"depth_head\.", "pretrained."),
    "glpn": (r"decoder\.bot_conv\.", "encoder."),
    "detectron": (r"sem_seg_head\.", "backbone."),
}
OURS = ("backbone.model.", "head.", "neck.levels.", "aux_head.", "aux_neck.")
BRIDGE = [  # names of heads.mmseg.ZooHead -> ours
    (r"^decode_head\.head\.", "head."),
    (r"^decode_head\.pyramid\.", "neck."),
    (r"^auxiliary_head\.head\.", "aux_head."),
    (r"^auxiliary_head\.pyramid\.", "aux_neck."),
]
BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask", "attention_bias_idxs")  # recomputed by the model
TAIL = r"(norm|fc_norm|head|head_dist|proj_head|mask_token)(\.|$)"  # behind the last map: stored, of no use to a dense model


def source_format(keys: Iterable[str]) -> str:
    """ "official-dense" if a head of one of the formats is among the names, "native" for ours, else "official" (a backbone)."""
    keys = list(keys)
    if program(keys):
        return "official-dense"
    return "native" if any(key.startswith("backbone.model.") for key in keys) else "official"


def program(keys: Iterable[str]) -> str | None:
    """The name in FORMATS of the program that wrote these names, or None if no head is among them."""
    return next((name for name, (mark, _) in FORMATS.items() if any(re.match(mark, key) for key in keys)), None)


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """`model`'s names for a file with a head; any other file unchanged.

    model: a heads.DensePredictor. Dropped: what the authors store and never run in dense prediction (classifier and norm
    behind the last map, index buffers), and an auxiliary head where the model has none. What else does not fit keeps a name.
    """
    form = program(list(state_dict))
    if form is None or not hasattr(model, "aux_head"):
        return dict(state_dict)
    prefix = FORMATS[form][1]
    native: dict[str, Tensor] = {}
    if form == "mmsegmentation":
        state_dict = bridged(state_dict, model)
        native = {key: value for key, value in state_dict.items() if key.startswith(OURS)}
        state_dict = {key: value for key, value in state_dict.items() if key not in native}
        if model.aux_head is None:
            native = {key: value for key, value in native.items() if not key.startswith("aux_")}
        necks = [key for key in model.state_dict() if key.startswith("neck.")]
        native |= {key: state_dict.pop(key) for key in necks if key in state_dict}
        if any(key.startswith("neck.convs.") for key in state_dict):
            raise ValueError(
                "the file has mmsegmentation's MultiLevelNeck and the predictor has another neck or none: build it with "
                "neck='multilevel'"
            )
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}, "aux_head": {}}
    if getattr(model.backbone, "taps", ())[-1:] == ("norm",):
        state_dict = {re.sub(r"^backbone\.final_norm\.", "backbone.norm.", key): value for key, value in state_dict.items()}
    for key, value in state_dict.items():
        if key.startswith(prefix):
            parts["backbone"][key.removeprefix(prefix)] = value
        elif key.startswith("auxiliary_head."):
            parts["aux_head"][key] = value
        else:
            parts["head"][re.sub(r"^neck\.", "", key)] = value
    backbone = model.backbone.model
    wanted = backbone.state_dict().keys()
    native |= {
        f"backbone.model.{key}": value
        for key, value in backbone_to_native(parts["backbone"], backbone).items()
        if key in wanted or not re.match(TAIL, key)
    }
    for name in ("head", "aux_head"):
        if (head := getattr(model, name)) is not None:
            native |= {f"{name}.{key}": value for key, value in head_to_native(parts[name], head).items()}
    return native


def bridged(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Our names for what heads.mmseg's ZooBackbone and ZooHead, and mmsegmentation's TIMMBackbone, put into a file."""
    own, found = model.backbone.model.state_dict().keys(), {}
    for key, value in state_dict.items():
        if m := re.match(r"backbone\.(?:timm_model\.)?(?:model\.)?(.+)", key):
            flat = re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", m[1])  # timm's flattened stages
            name = next((name for name in (m[1], flat) if name in own), None)
            if name and key.startswith(("backbone.timm_model.", "backbone.model.")):
                key = f"backbone.model.{name}"
        for pattern, replacement in BRIDGE:
            key = re.sub(pattern, replacement, key)
        found[key] = value
    return found


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Our names -> mmsegmentation's for heads of its making, isl-org's or Depth-Anything's for DPT, GLPN's for GLPN, and
    detectron2's for heads with queries.
    """
    parts: dict[str, dict[str, Tensor]] = {"backbone.model.": {}, "head.": {}, "aux_head.": {}, "neck.": {}}
    for key, value in state_dict.items():
        if prefix := next((p for p in parts if key.startswith(p)), None):
            parts[prefix][key.removeprefix(prefix)] = value
    head = importlib.import_module(f"weights.convert.{model.head.family}").to_official(parts["head."], model.head)
    aux = parts["aux_head."]
    module = convert.converter(model.backbone.model)
    backbone = module.to_official(parts["backbone.model."], model.backbone.model) if module else parts["backbone.model."]
    if any(key.startswith("levels.") for key in parts["neck."]):
        raise ValueError("ViTDet's pyramid, the neck of this predictor, has no place in other programs' files")
    if any(key.startswith("scratch.layer") for key in head):
        form = "depth-anything" if any(key.startswith("projects.") for key in head) else "isl"
    elif any(key.startswith("pixel_decoder.") for key in head):
        form = "detectron"
    else:
        form = "glpn" if "decoder.bot_conv.weight" in head else "mmsegmentation"
    if form == "mmsegmentation" and module is None and "vision_transformer" in architectures(model.backbone.model):
        backbone = convert.mmsegmentation.plain_vit(backbone)
    place = {"mmsegmentation": "decode_head.", "depth-anything": "depth_head.", "detectron": "sem_seg_head."}.get(form, "")
    official = {f"{FORMATS[form][1]}{key}": value for key, value in backbone.items()}
    official |= {f"neck.{key}": value for key, value in parts["neck."].items()}
    for key, value in head.items():
        neck = (
            form == "mmsegmentation"
            and key.startswith(("lateral_convs.", "fpn_convs."))
            and "scale_heads.0.0.conv.weight" in head
        )
        official[("neck." if neck else place) + key] = value
    return official | {f"auxiliary_head.{key}": value for key, value in aux.items()}


def head_to_native(state_dict: dict[str, Tensor], head: Any) -> dict[str, Tensor]:
    """A head's part of a file -> the head's names."""
    return importlib.import_module(f"weights.convert.{head.family}").to_native(state_dict, head)


def backbone_to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """An encoder's names in a dense file -> those of `model`, ours or timm's."""
    if convert.converter(model) is not None:
        return convert.to_native(state_dict, model)
    state_dict = {key: value for key, value in state_dict.items() if not key.endswith(BUFFERS)}
    architecture = architectures(model)
    if architecture & {"beit", "vision_transformer"} and "register_tokens" not in state_dict:
        return {key: value for key, value in state_dict.items() if key != "mask_token"}  # timm's names already
    for name, rename in (("levit", levit), ("nextvit", next_vit), ("resnet", detectron_resnet)):
        if name in architecture:
            return rename(state_dict, model)
    return convert.to_native(state_dict, model)


def architectures(model: Any) -> set[str]:
    """The modules that define the model's class and its bases, such as "vision_transformer"."""
    return {kind.__module__.rpartition(".")[2] for kind in type(model).__mro__}


def fit_shapes(native: dict[str, Tensor], model: Any, source: dict[str, Tensor]) -> tuple[dict[str, Tensor], convert.Shapes]:
    """As weights.convert.fit_shapes, for the backbone inside a dense predictor.

    The positions of a timm ViT or BEiT are resized by the rule of the program that wrote the file, anything else by its own.
    """
    prefix, backbone, form = "backbone.model.", model.backbone.model, program(source)
    inner = {key.removeprefix(prefix): value for key, value in native.items() if key.startswith(prefix)}
    encoder = FORMATS[form][1] if form else prefix
    written = {key.removeprefix(encoder): value for key, value in source.items() if key.startswith(encoder)}
    fitted = dict(inner)
    if convert.converter(backbone) is None and position_rule(source) is not None:
        own = backbone.state_dict()
        for name, value in inner.items():
            if name in own and own[name].shape != value.shape:
                fitted[name] = resize_positions(name, value, backbone, str(form))
    by_rule = {name: (tuple(inner[name].shape), tuple(fitted[name].shape)) for name in inner}
    fitted, resized = convert.fit_shapes(fitted, backbone, written)
    resized = {name: shapes for name, shapes in by_rule.items() if shapes[0] != shapes[1]} | resized
    return native | {prefix + name: value for name, value in fitted.items()}, {prefix + k: v for k, v in resized.items()}


def doubts(source: dict[str, Tensor], model: Any) -> list[str]:
    """A sentence if the model's backbone gives another result than the file's authors at sizes other than the native one."""
    backbone, rule = model.backbone.model, position_rule(source)
    bound = {"swin_transformer", "swin_transformer_v2", "levit"}
    if program(source) == "isl" and architectures(backbone) & bound and model.backbone.exact_size is None:
        return [
            "the file's authors run this encoder at one image size alone, so for any other there is no result of theirs to "
            "equal: build it with exact_size, as heads.published does, to refuse other sizes"
        ]
    if rule is None or not architectures(backbone) & {"vision_transformer", "beit"} or hasattr(backbone, "position_rule"):
        return []
    if convert.converter(backbone) is not None or not getattr(backbone, "dynamic_img_size", False):
        return []
    return [
        f"the file's authors resize positions by the rule {rule!r} and this backbone by timm's, so that images of another size "
        f"than it is built for come out differently: build it with positions={rule!r}, as heads.published does"
    ]


def position_rule(source: Iterable[str]) -> str | None:
    """The rule of heads.positions by which the authors of a file resize positions; None for timm's and where there are none."""
    source = list(source)
    form = program(source)
    if form == "mmsegmentation":  # its own plain ViT; timm's inside mmsegmentation has other names
        return "mmsegmentation" if "backbone.pos_embed" in source else None
    return {"isl": "dpt", "depth-anything": "dinov2"}.get(form or "")


def resize_positions(name: str, value: Tensor, model: Any, form: str) -> Tensor:
    """The positions of a timm ViT or BEiT for its grid, by the rule of its program; other tensors as they are.

    DPT and MiDaS: bilinear, without antialiasing; BEiT's three entries of the class token are kept. Depth-Anything: DINOv2's.
    mmsegmentation: bicubic, without antialiasing.

    Args:
        name: of the tensor.
        value: the tensor.
        model: a timm ViT or BEiT.
        form: whose rule it is, the format of the file.
    """
    if name.endswith("relative_position_bias_table") and "beit" in architectures(model):
        height, width = model.get_submodule(name.rpartition(".")[0]).window_size
        offsets = resample_bias_table(value[:-3], (2 * height - 1, 2 * width - 1), mode="bilinear")
        return torch.cat([offsets, value[-3:]])
    if name != "pos_embed" or "vision_transformer" not in architectures(model):
        return value
    count = 0 if model.no_embed_class else model.num_prefix_tokens
    grid = tuple(model.patch_embed.grid_size)
    if form in ("isl", "mmsegmentation"):
        mode = "bilinear" if form == "isl" else "bicubic"
        return resample_position_embedding(value, grid, count, mode=mode)
    old = square(value.shape[1] - count, "a position embedding")
    positions = dino_positions(value[:, count:], old, grid, antialias=False, offset=0.1)
    return torch.cat([value[:, :count], positions], 1)


def detectron_resnet(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """detectron2's names of a ResNet -> timm's: stem.conv1.norm, res2.0.conv1, shortcut. Others as weights.convert has them."""
    if not any(key.startswith("stem.conv1.") for key in state_dict):
        return convert.to_native(state_dict, model)
    native = {}
    for key, value in state_dict.items():
        key = key.removeprefix("stem.")
        key = re.sub(r"^res(\d)\.", lambda m: f"layer{int(m[1]) - 1}.", key)
        key = key.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
        native[re.sub(r"conv(\d)\.norm\.", r"bn\1.", key)] = value
    return native


LEVIT = [  # inside an attention or MLP half
    (r"^m\.", ""),
    (r"\.c\.", ".linear."),
    (r"^(qkv|kv)\.", r"\1."),
    (r"^q\.1\.", "q.ln."),
    (r"^proj\.1\.", "proj.ln."),
    (r"^0\.", "ln1."),
    (r"^2\.", "ln2."),
]


def levit(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The authors' flat list of attention and MLP halves -> timm's stages of blocks."""
    count = 1 + max((int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", key) for key in state_dict) if m), default=-1)
    places, stage, block = [], 0, 0
    for i in range(count):
        if f"blocks.{i}.q.1.c.weight" in state_dict:  # attention between stages
            stage, block = stage + 1, 0
            places.append(f"stages.{stage}.downsample.attn_downsample.")
        elif places and places[-1].endswith("attn_downsample."):
            places.append(f"stages.{stage}.downsample.mlp.")
        elif f"blocks.{i}.m.qkv.c.weight" in state_dict:
            places.append(f"stages.{stage}.blocks.{block}.attn.")
        else:
            places.append(f"stages.{stage}.blocks.{block}.mlp.")
            block += 1
    native = {}
    for key, value in state_dict.items():
        if m := re.match(r"blocks\.(\d+)\.(.*)", key):
            name = m[2]
            for pattern, replacement in LEVIT:
                name = re.sub(pattern, replacement, name)
            key = places[int(m[1])] + name
        elif m := re.match(r"patch_embed\.(\d)\.(c|bn)\.(.*)", key):
            key = f"stem.conv{int(m[1]) // 2 + 1}.{'linear' if m[2] == 'c' else 'bn'}.{m[3]}"
        else:
            key = re.sub(r"^(head|head_dist)\.l\.", r"\1.linear.", key)
        native[key] = value
    return native


def next_vit(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The authors' flat list of blocks -> timm's stages of blocks."""
    places = [f"stages.{s}.blocks.{b}." for s, stage in enumerate(model.stages) for b in range(len(stage.blocks))]
    native = {}
    for key, value in state_dict.items():
        if (m := re.match(r"features\.(\d+)\.(.*)", key)) and int(m[1]) < len(places):
            key = places[int(m[1])] + re.sub(r"^mlp\.conv", "mlp.fc", m[2])
        native[re.sub(r"^proj_head\.0\.", "head.fc.", key)] = value
    return native
