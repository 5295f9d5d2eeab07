"""GLPN and UPerNet on Swin, whole, at several sizes, against independent readings of their authors' code.

The readings use plain functions on the published file's names; they share no code with heads/, backbones/ or timm.
"""

import golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import backbones  # noqa: F401
import weights
from heads import DensePredictor
from heads.depth import DepthRule

State = dict[str, Tensor]


def close(got: Tensor, want: Tensor, what: str, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def conv(state: State, name: str, x: Tensor, **options: int) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)


def layer_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def batch_norm(state: State, name: str, x: Tensor) -> Tensor:
    parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts, eps=1e-5)


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


# GLPN


def mix_transformer(state: State, images: Tensor, depths: list[int], heads: list[int], ratios: list[int]) -> list[Tensor]:
    """SegFormer's encoder, names encoder.*: four normed maps."""
    x, maps = images, []
    for i, (depth, head, ratio) in enumerate(zip(depths, heads, ratios, strict=True), 1):
        kernel = 7 if i == 1 else 3
        x = conv(state, f"encoder.patch_embed{i}.proj", x, stride=4 if i == 1 else 2, padding=kernel // 2)
        h, w = x.shape[2:]
        x = layer_norm(state, f"encoder.patch_embed{i}.norm", x.flatten(2).mT, 1e-5)
        for j in range(depth):
            own = f"encoder.block{i}.{j}"
            y = layer_norm(state, f"{own}.norm1", x, 1e-6)
            q = linear(state, f"{own}.attn.q", y).unflatten(2, (head, -1)).transpose(1, 2)
            if ratio > 1:
                y = conv(state, f"{own}.attn.sr", y.mT.unflatten(2, (h, w)), stride=ratio).flatten(2).mT
                y = layer_norm(state, f"{own}.attn.norm", y, 1e-5)
            k, v = linear(state, f"{own}.attn.kv", y).unflatten(2, (2, head, -1)).permute(2, 0, 3, 1, 4)
            y = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
            x = x + linear(state, f"{own}.attn.proj", y.transpose(1, 2).flatten(2))
            y = linear(state, f"{own}.mlp.fc1", layer_norm(state, f"{own}.norm2", x, 1e-6)).mT.unflatten(2, (h, w))
            y = conv(state, f"{own}.mlp.dwconv.dwconv", y, padding=1, groups=y.shape[1]).flatten(2).mT
            x = x + linear(state, f"{own}.mlp.fc2", F.gelu(y))
        x = layer_norm(state, f"encoder.norm{i}", x, 1e-6).mT.unflatten(2, (h, w))
        maps.append(x)
    return maps


def glpn_reading(state: State, images: Tensor, kwargs: dict) -> Tensor:
    """The authors' forward of GLPN: metres B 1 H W."""
    maps = mix_transformer(state, images, kwargs["depths"], kwargs["num_heads"], kwargs["sr_ratios"])

    def fused(name: str, local: Tensor, path: Tensor) -> Tensor:
        x = torch.cat([local, path], 1)
        for block in ("conv1", "conv2"):
            x = batch_norm(state, f"{name}.{block}.1", conv(state, f"{name}.{block}.0", x, padding=1)).relu()
        gates = conv(state, f"{name}.conv3", x, padding=1).sigmoid()
        return local * gates[:, :1] + path * gates[:, 1:]

    path = doubled(conv(state, "decoder.bot_conv", maps[3]))
    path = doubled(fused("decoder.fusion1", conv(state, "decoder.skip_conv1", maps[2]), path))
    path = doubled(fused("decoder.fusion2", conv(state, "decoder.skip_conv2", maps[1]), path))
    path = doubled(doubled(fused("decoder.fusion3", maps[0], path)))
    x = conv(state, "last_layer_depth.0", path, padding=1).relu()
    return conv(state, "last_layer_depth.2", x, padding=1).sigmoid() * kwargs["max_depth"]


@pytest.mark.parametrize("build", ["native", "at_the_size"])
@pytest.mark.parametrize("case", golden.cases("glpn_model"))
def test_glpn_at_every_size(case, build):
    info, tensors = golden.load(case)
    state, kwargs = golden.state(tensors), info["kwargs"]
    with torch.no_grad():
        close(glpn_reading(state, tensors["input"], kwargs), tensors["output"], "the reading itself", **info["tolerance"])
    names = ("embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios", "qkv_bias")
    args = {name: kwargs[name] for name in names}
    for size in ((64, 96), (96, 96), (128, 64), (32, 160)):
        sized = size if build == "at_the_size" else None
        width = {"width": kwargs["channels_out"]}
        model = DensePredictor("pvt_v2_b4", "glpn", 1, width, backbone_args=args, img_size=sized).eval()
        report = weights.load_checkpoint(model, state)
        assert not report.missing and not report.unexpected and not report.resized, str(report)
        images = torch.rand(2, 3, *size)
        with torch.no_grad():
            got = DepthRule("sigmoid", max_depth=kwargs["max_depth"])(model(images))
            close(got, glpn_reading(state, images, kwargs), f"{size}", **info["tolerance"])


# UPerNet on Swin


def swin_reading(state: State, images: Tensor, heads: tuple[int, ...], window: int) -> list[Tensor]:
    """The authors' Swin for dense prediction, names backbone.*: a normed map of every stage."""
    state = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    x = F.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4))
    x = layer_norm(state, "patch_embed.norm", conv(state, "patch_embed.proj", x, stride=4).permute(0, 2, 3, 1), 1e-5)
    maps = []
    for i, head in enumerate(heads):
        depth = 1 + max(int(name.split(".")[3]) for name in state if name.startswith(f"layers.{i}.blocks."))
        for j in range(depth):
            own = f"layers.{i}.blocks.{j}"
            y = layer_norm(state, f"{own}.norm1", x, 1e-5)
            x = x + windows(state, f"{own}.attn", y, head, window, window // 2 if j % 2 else 0)
            y = F.gelu(linear(state, f"{own}.mlp.fc1", layer_norm(state, f"{own}.norm2", x, 1e-5)))
            x = x + linear(state, f"{own}.mlp.fc2", y)
        maps.append(layer_norm(state, f"norm{i}", x, 1e-5).permute(0, 3, 1, 2))
        if i + 1 < len(heads):
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = linear(state, f"layers.{i}.downsample.reduction", layer_norm(state, f"layers.{i}.downsample.norm", x, 1e-5))
    return maps


def windows(state: State, name: str, x: Tensor, heads: int, window: int, shift: int) -> Tensor:
    """Attention of one block, B H W C, window by window with loops; padded with zeros right and bottom, then rolled."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = x.shape[1:3]

    def band(position: int, length: int) -> int:  # which part of the image a rolled place came from
        return 0 if position < length - window else 1 if position < length - shift else 2

    places = [(r, c) for r in range(window) for c in range(window)]
    offsets = [[(a - c + window - 1) * (2 * window - 1) + b - d + window - 1 for c, d in places] for a, b in places]
    bias = state[f"{name}.relative_position_bias_table"][torch.tensor(offsets)].permute(2, 0, 1)
    x, out = x.roll((-shift, -shift), (1, 2)), torch.empty_like(x)
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            tokens = x[:, top : top + window, left : left + window].flatten(1, 2)
            q, k, v = linear(state, f"{name}.qkv", tokens).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            logits = q * q.shape[-1] ** -0.5 @ k.mT + bias
            if shift:
                parts = torch.tensor([3 * band(top + r, rows) + band(left + c, columns) for r, c in places])
                logits = logits - 100.0 * (parts[:, None] != parts[None])
            y = linear(state, f"{name}.proj", (logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
            out[:, top : top + window, left : left + window] = y.unflatten(1, (window, window))
    return out.roll((shift, shift), (1, 2))[:, :height, :width]


def upernet_reading(state: State, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """mmsegmentation's UPerHead and its resize to the image: B K H W."""

    def block(name: str, x: Tensor, padding: int = 0) -> Tensor:
        return batch_norm(state, f"decode_head.{name}.bn", conv(state, f"decode_head.{name}.conv", x, padding=padding)).relu()

    pools = [block(f"psp_modules.{i}.1", F.adaptive_avg_pool2d(maps[-1], bins)) for i, bins in enumerate((1, 2, 3, 6))]
    coarsest = tuple(maps[-1].shape[2:])
    path = block("bottleneck", torch.cat([maps[-1], *(resized(pool, coarsest) for pool in pools)], 1), 1)
    levels = [path]
    for i in (2, 1, 0):
        path = block(f"lateral_convs.{i}", maps[i]) + resized(path, tuple(maps[i].shape[2:]))
        levels.insert(0, block(f"fpn_convs.{i}", path, 1))
    finest = tuple(levels[0].shape[2:])
    x = block("fpn_bottleneck", torch.cat([resized(level, finest) for level in levels], 1), 1)
    return resized(conv(state, "decode_head.conv_seg", x), size)


@pytest.mark.parametrize("build", ["native", "at_the_size"])
def test_upernet_on_swin_at_every_size(build):
    torch.manual_seed(0)
    args = {"embed_dim": 8, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4, "feature_norms": True}

    def made(size: tuple[int, int] | None) -> DensePredictor:
        return DensePredictor("swin_t", "upernet", 5, {"width": 8}, backbone_args=args, img_size=size).eval()

    source = made(None)
    with torch.no_grad():
        for name, value in [*source.named_parameters(), *source.named_buffers()]:
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if name.endswith("running_var") else value.normal_(0, 0.3)
    state = weights.convert.converter(source).to_official(source.state_dict(), source)
    for size in ((64, 64), (96, 160), (128, 64), (50, 70)):
        model = made(size if build == "at_the_size" else None)
        report = weights.load_checkpoint(model, state)
        assert not report.missing and not report.unexpected and not report.resized, str(report)
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            got, want = model(images), upernet_reading(state, swin_reading(state, images, args["num_heads"], 4), size)
        assert want.std() > 0
        close(got, want, f"{size}", atol=2e-5 * want.abs().max().item())
