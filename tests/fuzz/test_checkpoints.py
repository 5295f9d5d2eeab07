"""Damaged and hostile weights files end in ValueError (or load), never in another exception.

ZOO_FUZZ sets the number of cases of each kind, 100 in the gate; ZOO_FUZZ=10000 pytest tests/fuzz runs as many as it says.
"""

import os
import random
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import weights
from backbones.poolformer import PoolFormer
from heads import DensePredictor

CASES = int(os.environ.get("ZOO_FUZZ", "100"))
SMALL = {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)}


def small() -> PoolFormer:
    return PoolFormer(**SMALL, num_classes=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A whole file of each kind."""
    folder, state = tmp_path_factory.mktemp("whole"), small().state_dict()
    torch.save({"model": state, "epoch": 3, "args": np.float32(1)}, folder / "zip.pth")
    torch.save({"state_dict": state, "lr": [0.1, {"a": (1, 2)}]}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "file.safetensors")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mutated(content: bytes, draw: random.Random) -> bytes:
    """One to four damages: bits, bytes, a stretch lost, repeated, of zeros or of noise, the end cut; mostly near the start."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(min(len(data), 2000))
        length = draw.choice([1, 2, 8, 100])
        kind = draw.randrange(7)
        if kind == 0:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[place] = draw.randrange(256)
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length]
        elif kind == 4:
            data[place : place + length] = bytes(length)
        elif kind == 5:
            data[place : place + length] = draw.randbytes(length)
        else:
            del data[place:]
        if not data:
            break
    return bytes(data)


def attempt(model: torch.nn.Module, source, what: str) -> None:
    """Load, with any outcome that is documented."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights.load_checkpoint(model, source, strict=False)
    except ValueError as error:
        assert str(error).strip(), what
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("kind", ["zip.pth", "legacy.pth", "file.safetensors"])
def test_damaged_files(kind, files, tmp_path):
    model = small()
    for seed in range(CASES):
        path = tmp_path / kind
        path.write_bytes(mutated(files[kind], random.Random(f"{kind} {seed}")))
        attempt(model, path, f"{kind}, seed {seed}")


def value(draw: random.Random, state: dict, depth: int = 0):
    """What could stand in a file: tensors of any shape and kind, names of the model's or of others, nested."""
    names = list(state)
    kind = draw.randrange(12 if depth < 3 else 8)
    if kind == 0:
        return draw.choice([None, 3, -1.5, "text", b"bytes", True, (), [1], {1, 2}])
    if kind == 1:
        return state[draw.choice(names)]
    if kind == 2:
        return torch.zeros([draw.randrange(4) for _ in range(draw.randrange(6))])
    if kind == 3:
        other = state[draw.choice(names)]
        return draw.choice(
            [
                other.to(torch.complex64),
                other.bool(),
                other.half(),
                other.to("meta"),
                other.flatten().to_sparse(),
                torch.zeros(1).expand(10**8, 2, 2),
                other.float() * torch.nan,
                other.mT if other.ndim > 1 else other,
                torch.nn.Parameter(other, requires_grad=False),
                torch.nested.nested_tensor([other.flatten(), other.flatten()]),
            ]
        )
    if kind == 4:
        return np.zeros(3)
    if kind < 8:
        return dict(state)
    mapping = OrderedDict() if draw.random() < 0.3 else {}
    prefix = draw.choice(["", "", "module.", "backbone.", "backbone.model.", "head.", "decode_head.", "encoder.layer.0."])
    for _ in range(draw.randrange(8)):
        key = draw.choice(
            [*names, "model", "state_dict", "model_ema", "optimizer", "", ".", "a.b", 1, None, (1, 2), "pos_embed"]
        )
        mapping[prefix + key if isinstance(key, str) else key] = value(draw, state, depth + 1)
    if draw.random() < 0.5:
        mapping |= {prefix + name: state[name] for name in names if draw.random() < 0.9}
    return mapping


@pytest.mark.parametrize("target", ["backbone", "predictor"])
def test_any_mapping(target):
    model = small() if target == "backbone" else DensePredictor(small(), "linear", 3, aux_head="fcn", aux_args={"width": 4})
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed in range(CASES):
        draw = random.Random(f"{target} {seed}")
        content = value(draw, state)
        attempt(model, content if isinstance(content, dict) else {"x": content}, f"{target}, seed {seed}")


FORMATS = [
    "patch_embed.proj.weight",
    "pos_embed",
    "cls_token",
    "mask_token",
    "register_tokens",
    "layers.0.blocks.0.attn.relative_position_bias_table",
    "layers.0.blocks.0.attn.w_msa.relative_position_bias_table",
    "layers.0.downsample.reduction.weight",
    "layers.0.downsample.norm.weight",
    "stages.0.blocks.0.attn.rpb",
    "swin.encoder.layers.0.blocks.0.attention.self.query.weight",
    "encoder.layer.0.attention.attention.key.weight",
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "layers.0.1.0.attn.attn.in_proj_weight",
    "decode_head.linear_fuse.weight",
    "decode_head.linear_c.0.proj.weight",
    "neck.reassemble_stage.layers.0.projection.weight",
    "scratch.layer1_rn.weight",
    "depth_head.projects.0.weight",
    "decoder.bot_conv.weight",
    "pretrained.model.pos_embed",
    "levels.0.blocks.0.gamma1",
    "head.weight",
    "head.fc.weight",
]


@pytest.mark.parametrize(
    "name", ["nat_mini", "swin_t", "pit_ti", "cvt_13", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_names_of_other_formats_with_any_shapes(name):
    import timm

    import backbones  # noqa: F401

    model = timm.create_model(name, num_classes=3)
    state = model.state_dict()
    for seed in range(max(1, CASES // 4)):
        draw = random.Random(f"{name} {seed}")
        content = dict(state) if draw.random() < 0.5 else {}
        for key in draw.sample(FORMATS, draw.randrange(1, 8)):
            content[key] = torch.zeros([draw.choice([0, 1, 2, 3, 4, 9, 16]) for _ in range(draw.randrange(5))])
        for key in draw.sample(list(state), 3):
            content[key] = torch.zeros([draw.choice([1, 2, 5, 9]) for _ in range(draw.randrange(5))])
        attempt(model, content, f"{name}, seed {seed}")
