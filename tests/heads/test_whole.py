"""Whole published dense models at several sizes, square and not: stored outputs of the authors' code, and independent readings.

The readings are written from the papers and the authors' repositories with plain functions on the published file's names; they
share no code with heads/ or timm.
"""

import math

import golden
import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

import weights
from heads import DensePredictor, FeatureBackbone, published
from heads.positions import follow
from heads.published import PUBLISHED
from weights.resample import dino_positions

State = dict[str, torch.Tensor]


def close(got: torch.Tensor, want: torch.Tensor, what: str, **tolerance: float) -> None:
    torch.testing.assert_close(got, want, **tolerance, msg=lambda text: f"{what}: {text}")


# Depth-Anything-V2: stored outputs


def depth_anything(info: dict, img_size: tuple[int, int] | None) -> DensePredictor:
    """The fixture's model as a user builds it, by timm's name; img_size None: at the file's native size."""
    kwargs, head = info["encoder_kwargs"], info["head_kwargs"]
    args = {name: kwargs[name] for name in ("embed_dim", "depth", "num_heads", "mlp_ratio", "init_values")}
    args |= {"out_indices": info["taps"], "norm": True, "positions": "dinov2"}
    head_args = {
        "width": head["features"],
        "reassemble": head["out_channels"],
        "readout": "project" if head["use_clstoken"] else "ignore",
        "norm": head["use_bn"],
        "unit_bias": True,
        "patch_size": kwargs["patch_size"],
    }
    size = img_size or (kwargs["img_size"],) * 2
    return DensePredictor("vit_small_patch14_dinov2", "dpt", 1, head_args, backbone_args=args, img_size=size)


@pytest.mark.parametrize("build", ["native", "at_the_size"])
@pytest.mark.parametrize("case", golden.cases("whole_depth_anything_v2"))
def test_depth_anything_at_every_size(case, build):
    info, tensors = golden.load(case)
    state = golden.state(tensors)
    for size in info["sizes"]:
        images = tensors[f"{size}/input"]
        model = depth_anything(info, None if build == "native" else tuple(images.shape[-2:])).eval()
        report = weights.load_checkpoint(model, state)
        assert not report.missing and not report.unexpected
        grid, stored = model.backbone.model.patch_embed.grid_size, info["encoder_kwargs"]["img_size"] // 14
        assert ("backbone.model.pos_embed" in report.resized) == (grid != (stored, stored))
        with torch.no_grad():
            maps, output = model.backbone(images), model(images).relu()[:, 0]
        for i, found in enumerate(maps):
            m = found[0] if isinstance(found, tuple) else found
            got, want = m.flatten(2).mT, tensors[f"{size}/tokens_{i}"]
            close(got, want, f"{size} map {i}", **golden.tolerance(info))
        close(output, tensors[f"{size}/output"], size, **golden.tolerance(info))


# DPT and MiDaS on ViT and BEiT: an independent reading


def vit_blocks(state: State, x: torch.Tensor, heads: int, biases: list[torch.Tensor] | None) -> list[torch.Tensor]:
    """Raw outputs of all blocks; biases: of the attention of each block, heads N N."""
    outputs, depth = [], 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth):
        own = {name.removeprefix(f"blocks.{i}."): value for name, value in state.items() if name.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, x.shape[-1:], own["norm1.weight"], own["norm1.bias"], 1e-6)
        if biases is None:
            bias = own["attn.qkv.bias"]
        else:
            bias = torch.cat([own["attn.q_bias"], torch.zeros_like(own["attn.v_bias"]), own["attn.v_bias"]])
        qkv = F.linear(y, own["attn.qkv.weight"], bias)
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        logits = (q @ k.mT) * q.shape[-1] ** -0.5
        logits = logits if biases is None else logits + biases[i]
        y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        y = F.linear(y, own["attn.proj.weight"], own["attn.proj.bias"])
        x = x + y * own.get("gamma_1", 1)
        y = F.layer_norm(x, x.shape[-1:], own["norm2.weight"], own["norm2.bias"], 1e-6)
        y = F.linear(
            F.gelu(F.linear(y, own["mlp.fc1.weight"], own["mlp.fc1.bias"])), own["mlp.fc2.weight"], own["mlp.fc2.bias"]
        )
        x = x + y * own.get("gamma_2", 1)
        outputs.append(x)
    return outputs


def offsets_bias(table: torch.Tensor, old: int, grid: tuple[int, int]) -> torch.Tensor:
    """A BEiT block's bias, heads N N, from its table of a square window of `old`, pair by pair."""
    (h, w), side = grid, 2 * old - 1
    image = table[:-3].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, (2 * h - 1, 2 * w - 1), mode="bilinear")[0]
    count = h * w
    bias = torch.empty(table.shape[1], count + 1, count + 1)
    for i in range(count):
        for j in range(count):
            bias[:, 1 + i, 1 + j] = image[:, i // w - j // w + h - 1, i % w - j % w + w - 1]
    bias[:, 0, :], bias[:, :, 0] = table[-3][:, None], table[-2][:, None]
    bias[:, 0, 0] = table[-1]
    return bias


def reading(state: State, images: torch.Tensor, heads: int, native: int, double: bool) -> torch.Tensor:
    """The authors' forward of DPT or MiDaS on a plain ViT or BEiT of patch 16, hooks on blocks 0 to 3: B 1 H W."""
    vit = {name.removeprefix("pretrained.model."): value for name, value in state.items()}
    h, w = images.shape[2] // 16, images.shape[3] // 16
    x = F.conv2d(images, vit["patch_embed.proj.weight"], vit["patch_embed.proj.bias"], stride=16).flatten(2).mT
    x = torch.cat([vit["cls_token"].expand(len(x), -1, -1), x], 1)
    biases = None
    if "pos_embed" in vit:
        grid = vit["pos_embed"][:, 1:].reshape(1, native, native, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (h, w), mode="bilinear").permute(0, 2, 3, 1).reshape(1, h * w, -1)
        x = x + torch.cat([vit["pos_embed"][:, :1], grid], 1)
    else:
        tables = [vit[f"blocks.{i}.attn.relative_position_bias_table"] for i in range(4)]
        biases = [offsets_bias(table, native, (h, w)) for table in tables]
    maps = []
    for i, tokens in enumerate(vit_blocks(vit, x, heads, biases), 1):
        own = f"pretrained.act_postprocess{i}."
        pairs = torch.cat([tokens[:, 1:], tokens[:, :1].expand_as(tokens[:, 1:])], -1)
        x = F.gelu(F.linear(pairs, state[own + "0.project.0.weight"], state[own + "0.project.0.bias"]))
        x = F.conv2d(x.mT.unflatten(2, (h, w)), state[own + "3.weight"], state[own + "3.bias"])
        if i < 3:
            x = F.conv_transpose2d(x, state[own + "4.weight"], state[own + "4.bias"], stride=(4, 2)[i - 1])
        if i == 4:
            x = F.conv2d(x, state[own + "4.weight"], state[own + "4.bias"], stride=2, padding=1)
        maps.append(x)
    return fused(state, maps, double)


def fused(state: State, maps: list[torch.Tensor], double: bool) -> torch.Tensor:
    """DPT's decoder and its depth head on four reassembled maps: B 1 H W."""
    maps = [F.conv2d(x, state[f"scratch.layer{i}_rn.weight"], padding=1) for i, x in enumerate(maps, 1)]

    def unit(x: torch.Tensor, name: str) -> torch.Tensor:
        y = F.conv2d(x.relu(), state[name + ".conv1.weight"], state[name + ".conv1.bias"], padding=1)
        return x + F.conv2d(y.relu(), state[name + ".conv2.weight"], state[name + ".conv2.bias"], padding=1)

    path = None
    for i in (4, 3, 2, 1):
        name = f"scratch.refinenet{i}"
        path = maps[i - 1] if path is None else path + unit(maps[i - 1], name + ".resConfUnit1")
        path = unit(path, name + ".resConfUnit2")
        size = [2 * n for n in path.shape[2:]] if double or i == 1 else maps[i - 2].shape[2:]
        path = F.interpolate(path, tuple(size), mode="bilinear", align_corners=True)
        path = F.conv2d(path, state[name + ".out_conv.weight"], state[name + ".out_conv.bias"])
    out = "scratch.output_conv."
    x = F.conv2d(path, state[out + "0.weight"], state[out + "0.bias"], padding=1)
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    x = F.conv2d(x, state[out + "2.weight"], state[out + "2.bias"], padding=1).relu()
    return F.conv2d(x, state[out + "4.weight"], state[out + "4.bias"]).relu()


TINY = {"embed_dim": 24, "depth": 4, "num_heads": 2, "mlp_ratio": 2}
HEAD = {"width": 8, "readout": "project", "reassemble": (4, 6, 8, 12)}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight drawn, so that positions, gates and biases of zero count too; norms near one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1 if "norm" in name and name.endswith("weight") else 0, 0.2)
        for name, value in model.named_parameters():
            if name.endswith(("pos_embed", "relative_position_bias_table")):
                value.normal_(0, 1)
    return model.eval()


@pytest.mark.parametrize("build", ["native", "at_the_size"])
@pytest.mark.parametrize("encoder", ["vit_base_patch16_384", "beit_base_patch16_384"])
@pytest.mark.parametrize("fusion", ["next", "double"])
def test_dpt_and_midas_on_vit_and_beit_at_every_size(encoder, fusion, build):
    vit = {**TINY, "out_indices": (0, 1, 2, 3), "positions": "dpt"}
    args = HEAD | {"fusion": fusion}
    source = randomised(DensePredictor(encoder, "dpt", 1, args, backbone_args=vit, img_size=64))
    state = weights.convert.converter(source).to_official(source.state_dict(), source)
    for size in ((64, 64), (96, 160), (128, 64), (64, 96), (48, 80)):
        if fusion == "double" and any(n % 32 for n in size):
            continue  # DPT's own code takes multiples of 32 alone
        model = DensePredictor(encoder, "dpt", 1, args, backbone_args=vit, img_size=64 if build == "native" else size).eval()
        report = weights.load_checkpoint(model, state)
        assert bool(report.resized) == (build == "at_the_size" and size != (64, 64)), str(report)
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            got, want = model(images).relu(), reading(state, images, 2, 4, fusion == "double")
        assert want.std() > 0
        close(got, want, f"{size}", rtol=1e-4, atol=2e-5 * want.abs().max().item())


def same(x: torch.Tensor, kernel: int, stride: int, value: float = 0.0) -> torch.Tensor:
    """TensorFlow's SAME padding: what is odd goes to the right and the bottom."""
    wide, high = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (x.shape[3], x.shape[2]))
    return F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2), value=value)


def standardised(state: State, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """A convolution of the ResNet: weights standardised by output channel, SAME padding."""
    weight = state[f"{name}.weight"]
    flat = weight.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, unbiased=False, keepdim=True) + 1e-8).sqrt()
    return F.conv2d(same(x, weight.shape[-1], stride), flat.view_as(weight), stride=stride)


def group_norm(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def resnet(state: State, images: torch.Tensor, depths: tuple[int, ...]) -> list[torch.Tensor]:
    """Maps of the stages of the post-activation ResNet in front of the hybrid ViT."""
    x = group_norm(state, "stem.norm", standardised(state, "stem.conv", images, 2)).relu()
    x, maps = F.max_pool2d(same(x, 3, 2, -torch.inf), 3, 2), []
    for i, depth in enumerate(depths):
        for j in range(depth):
            own, stride = f"stages.{i}.blocks.{j}", 2 if i and not j else 1
            y = group_norm(state, f"{own}.norm1", standardised(state, f"{own}.conv1", x)).relu()
            y = group_norm(state, f"{own}.norm2", standardised(state, f"{own}.conv2", y, stride)).relu()
            y = group_norm(state, f"{own}.norm3", standardised(state, f"{own}.conv3", y))
            if not j:
                x = group_norm(state, f"{own}.downsample.norm", standardised(state, f"{own}.downsample.conv", x, stride))
            x = (x + y).relu()
        maps.append(x)
    return maps


def hybrid_reading(state: State, images: torch.Tensor, heads: int, native: int, double: bool) -> torch.Tensor:
    """The authors' forward of DPT-Hybrid: ResNet stages 1 and 2, then blocks 9 and 12 of the ViT on the third: B 1 H W."""
    vit = {name.removeprefix("pretrained.model."): value for name, value in state.items()}
    front = {name.removeprefix("patch_embed.backbone."): value for name, value in vit.items() if ".backbone." in name}
    maps = resnet(front, images, (3, 4, 9))
    h, w = maps[2].shape[2:]
    x = F.conv2d(maps[2], vit["patch_embed.proj.weight"], vit["patch_embed.proj.bias"]).flatten(2).mT
    grid = vit["pos_embed"][:, 1:].reshape(1, native, native, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (h, w), mode="bilinear").permute(0, 2, 3, 1).reshape(1, h * w, -1)
    x = torch.cat([vit["cls_token"].expand(len(x), -1, -1), x], 1) + torch.cat([vit["pos_embed"][:, :1], grid], 1)
    blocks = vit_blocks(vit, x, heads, None)
    found = maps[:2]
    for i, tokens in ((3, blocks[8]), (4, blocks[11])):
        own = f"pretrained.act_postprocess{i}."
        pairs = torch.cat([tokens[:, 1:], tokens[:, :1].expand_as(tokens[:, 1:])], -1)
        x = F.gelu(F.linear(pairs, state[own + "0.project.0.weight"], state[own + "0.project.0.bias"]))
        x = F.conv2d(x.mT.unflatten(2, (h, w)), state[own + "3.weight"], state[own + "3.bias"])
        if i == 4:
            x = F.conv2d(x, state[own + "4.weight"], state[own + "4.bias"], stride=2, padding=1)
        found.append(x)
    return fused(state, found, double)


@pytest.mark.parametrize("fusion", ["next", "double"])
def test_dpt_hybrid_at_every_size(fusion):
    """The ResNet whole, a narrow ViT behind it; built for one size and run at others, square and not."""
    args = {**PUBLISHED["dpt_hybrid_depth"].head_args, "width": 8, "reassemble": (256, 512, 12, 12), "fusion": fusion}
    vit = {**PUBLISHED["dpt_hybrid_depth"].backbone_args, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 2}
    source = randomised(DensePredictor("vit_base_r50_s16_384", "dpt", 1, args, backbone_args=vit, img_size=64))
    state = weights.convert.converter(source).to_official(source.state_dict(), source)
    for size in ((64, 64), (96, 160), (128, 64), (64, 96), (48, 80)):
        if fusion == "double" and any(n % 32 for n in size):
            continue
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            got, want = source(images).relu(), hybrid_reading(state, images, 2, 4, fusion == "double")
        assert want.std() > 0
        close(got, want, f"{size}", rtol=1e-3, atol=1e-4 * want.abs().max().item())  # 50 convolutions in front


# MiDaS on Next-ViT: an independent reading, on a file in the authors' names


NEXT_DEPTHS = (1, 2, 5, 1)  # of the authors' 3, 4, 30, 3
NEXT_WIDTHS = ((96,), (192, 256), (384, 384, 384, 384, 512), (1024,))  # of their blocks


def next_vit_file(width: int) -> State:
    """A whole file as MiDaS stores it, with random numbers: the names and shapes of its code, a fusion of `width` channels."""
    torch.manual_seed(0)
    state: State = {}

    def weight(name: str, *shape: int, bias: bool = False) -> None:
        state[f"{name}.weight"] = torch.randn(shape) / math.prod(shape[1:]) ** 0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(shape[0]) / 4

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"], state[f"{name}.running_var"] = torch.rand(2, channels) + 0.5
        state[f"{name}.bias"], state[f"{name}.running_mean"] = torch.randn(2, channels) / 4
        state[f"{name}.num_batches_tracked"] = torch.tensor(1)

    def embed(name: str, before: int, after: int, stride: int) -> None:
        if stride == 2 or before != after:
            weight(f"{name}.conv", after, before, 1, 1)
            norm(f"{name}.norm", after)

    def convolution(name: str, channels: int) -> None:
        weight(f"{name}.group_conv3x3", channels, 32, 3, 3)
        norm(f"{name}.norm", channels)
        weight(f"{name}.projection", channels, channels, 1, 1)

    model, channels, place = "pretrained.model.", 3, 0
    for i, after in enumerate((64, 32, 64, 64)):
        weight(f"{model}stem.{i}.conv", after, channels, 3, 3)
        norm(f"{model}stem.{i}.norm", after)
        channels = after
    for stage, widths in enumerate(NEXT_WIDTHS):
        for block, after in enumerate(widths):
            own, stride = f"{model}features.{place}.", 2 if stage and not block else 1
            if after in (256, 512, 1024):
                inner = after * 3 // 4
                embed(f"{own}patch_embed", channels, inner, stride)
                norm(f"{own}norm1", inner)
                for name in "qkv":
                    weight(f"{own}e_mhsa.{name}", inner, inner, bias=True)
                weight(f"{own}e_mhsa.proj", inner, inner, bias=True)
                if stage < 3:
                    norm(f"{own}e_mhsa.norm", inner)
                embed(f"{own}projection", inner, after - inner, 1)
                convolution(f"{own}mhca", after - inner)
                norm(f"{own}norm2", after)
            else:
                embed(f"{own}patch_embed", channels, after, stride)
                convolution(f"{own}mhca", after)
                norm(f"{own}norm", after)
            hidden = after * (2 if after in (256, 512, 1024) else 3)
            weight(f"{own}mlp.conv1", hidden, after, 1, 1, bias=True)
            weight(f"{own}mlp.conv2", after, hidden, 1, 1, bias=True)
            channels, place = after, place + 1
    norm(f"{model}norm", channels)
    weight(f"{model}proj_head.0", 10, channels, bias=True)
    for i, after in enumerate(widths[-1] for widths in NEXT_WIDTHS):
        weight(f"scratch.layer{i + 1}_rn", width, after, 3, 3)
        for unit in (1, 2):
            for conv in (1, 2):
                weight(f"scratch.refinenet{i + 1}.resConfUnit{unit}.conv{conv}", width, width, 3, 3, bias=True)
        weight(f"scratch.refinenet{i + 1}.out_conv", width, width, 1, 1, bias=True)
    weight("scratch.output_conv.0", width // 2, width, 3, 3, bias=True)
    weight("scratch.output_conv.2", 32, width // 2, 3, 3, bias=True)
    weight("scratch.output_conv.4", 1, 32, 1, 1, bias=True)
    return state


def next_vit_reading(state: State, images: torch.Tensor) -> torch.Tensor:
    """The authors' forward of MiDaS on Next-ViT, hooks behind the last block of every stage: B 1 H W."""
    vit = {name.removeprefix("pretrained.model."): value for name, value in state.items()}

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        parts = (vit[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-5)

    def embed(name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
        if stride == 2:  # an odd last row or column is averaged over what there is
            x = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        return norm(f"{name}.norm", F.conv2d(x, vit[f"{name}.conv.weight"])) if f"{name}.conv.weight" in vit else x

    def convolution(name: str, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, vit[f"{name}.group_conv3x3.weight"], padding=1, groups=x.shape[1] // 32)
        return F.conv2d(norm(f"{name}.norm", y).relu(), vit[f"{name}.projection.weight"])

    def mlp(name: str, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, vit[f"{name}.conv1.weight"], vit[f"{name}.conv1.bias"]).relu()
        return F.conv2d(x, vit[f"{name}.conv2.weight"], vit[f"{name}.conv2.bias"])

    def attention(name: str, x: torch.Tensor, ratio: int) -> torch.Tensor:  # B N C
        def project(part: str, tokens: torch.Tensor) -> torch.Tensor:
            tokens = F.linear(tokens, vit[f"{name}.{part}.weight"], vit[f"{name}.{part}.bias"])
            return tokens.unflatten(2, (-1, 32)).transpose(1, 2)

        few = x
        if ratio > 1:  # tokens in a row, wherever rows of the map end; what is left over at the end is not read
            count = x.shape[1] // ratio**2
            few = x[:, : count * ratio**2].unflatten(1, (count, ratio**2)).mean(2)
            few = norm(f"{name}.norm", few.mT).mT
        weights = (project("q", x) @ project("k", few).mT * 32**-0.5).softmax(-1)
        y = (weights @ project("v", few)).transpose(1, 2).flatten(2)
        return F.linear(y, vit[f"{name}.proj.weight"], vit[f"{name}.proj.bias"])

    x, maps, place = images, [], 0
    for i, stride in enumerate((2, 1, 1, 2)):
        x = norm(f"stem.{i}.norm", F.conv2d(x, vit[f"stem.{i}.conv.weight"], stride=stride, padding=1)).relu()
    for stage, widths in enumerate(NEXT_WIDTHS):
        for block in range(len(widths)):
            own, stride = f"features.{place}.", 2 if stage and not block else 1
            x = embed(f"{own}patch_embed", x, stride)
            if f"{own}norm1.weight" in vit:
                tokens = norm(f"{own}norm1", x).flatten(2).mT
                x = x + attention(f"{own}e_mhsa", tokens, (8, 4, 2, 1)[stage]).mT.unflatten(2, x.shape[2:])
                y = embed(f"{own}projection", x, 1)
                x = torch.cat([x, y + convolution(f"{own}mhca", y)], 1)
                x = x + mlp(f"{own}mlp", norm(f"{own}norm2", x))
            else:
                x = x + convolution(f"{own}mhca", x)
                x = x + mlp(f"{own}mlp", norm(f"{own}norm", x))
            place += 1
        maps.append(x)
    return fused(state, maps, double=False)


@pytest.mark.parametrize("build", ["native", "at_the_size"])
def test_midas_on_next_vit_at_every_size(build):
    state = next_vit_file(16)
    for size in ((64, 64), (96, 160), (128, 64), (72, 100)):
        args = {"depths": NEXT_DEPTHS, **PUBLISHED["dpt_next_vit_large_384"].backbone_args}
        img_size = size if build == "at_the_size" else None
        model = DensePredictor("nextvit_large", "dpt", 1, {"width": 16}, backbone_args=args, img_size=img_size).eval()
        report = weights.load_checkpoint(model, state)
        assert not report.missing and not report.unexpected and not report.resized and not report.warnings, str(report)
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            got, want = model(images).relu(), next_vit_reading(state, images)
        assert want.std() > 0
        close(got, want, f"{size}", rtol=1e-3, atol=1e-4 * want.abs().max().item())  # some 60 convolutions


# MiDaS on Swin, SwinV2 and LeViT: its authors' code asserts the size (Swin) or holds its grid (act_postprocess, LeViT's tables)


@pytest.mark.parametrize("name", [name for name, spec in PUBLISHED.items() if "exact_size" in spec.backbone_args])
def test_midas_on_encoders_of_one_size_refuses_others(name):
    height, width = PUBLISHED[name].size
    assert published.input_size(480, 640, (height, width), 32, "minimal", PUBLISHED[name].keep_aspect) == (height, width)
    with torch.device("meta"):
        models = [published.build(name)]
        if "large" not in name and "base" not in name:  # which are built as slowly as they are large
            models.append(published.build(name, img_size=(height, width)))
        for model in models:
            assert model.backbone.padded_size(height, width) == (height, width)
            for size in ((height, 2 * width), (height - 32, width), (2 * height, 2 * width), (64, 64)):
                with pytest.raises(ValueError, match=f"of {height} x {width} alone, .* these are {size[0]} x {size[1]}:"):
                    model(torch.empty(1, 3, *size))
        with pytest.raises(ValueError, match=f"takes images of {height} x {width} alone, as its authors' code does"):
            published.build(name, img_size=(height, width + 32))


def test_every_midas_encoder_follows_its_authors_at_other_sizes_or_refuses_them():
    for name, spec in PUBLISHED.items():
        if spec.source == "isl-org/MiDaS":
            assert {"positions", "exact_size"} & spec.backbone_args.keys() or spec.backbone == "nextvit_large", name


def test_a_midas_file_in_a_predictor_of_free_size_says_what_is_lost():
    small = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 4}
    args = small | {"exact_size": 64}
    source = DensePredictor("swin_tiny_patch4_window7_224", "dpt", 1, {"width": 8}, backbone_args=args, img_size=64)
    state = weights.convert.converter(source).to_official(source.state_dict(), source)
    assert not weights.load_checkpoint(source, state).warnings
    free = DensePredictor("swin_tiny_patch4_window7_224", "dpt", 1, {"width": 8}, backbone_args=small, img_size=64)
    (warning,) = weights.load_checkpoint(free, state).warnings
    assert "run this encoder at one image size alone" in warning
    with pytest.raises(ValueError, match=r"exact_size is \[1, 2, 3\]; give the height and width"):
        FeatureBackbone("resnet18", exact_size=[1, 2, 3])


@pytest.mark.parametrize("new", [(4, 4), (5, 9), (3, 4), (7, 6)])
def test_the_two_copies_of_dinov2s_rule_agree(new):
    """heads/ may not import weights/, so the rule stands in both."""
    vit = follow(VisionTransformer(img_size=64, embed_dim=8, depth=1, num_heads=2, dynamic_img_size=True), "dinov2")
    table = torch.randn(1, 16, 8)
    assert torch.equal(vit.resize_positions(table, (4, 4), new), dino_positions(table, (4, 4), new, False, 0.1))


# What every published entry promises


def test_published_vits_and_beits_name_their_authors_rule():
    rules = {"DepthAnything/Depth-Anything-V2": "dinov2", "open-mmlab/mmsegmentation": "mmsegmentation"}
    for name, spec in PUBLISHED.items():
        plain = spec.backbone.startswith(("vit_", "beit_", "deit_"))
        assert spec.backbone_args.get("positions") == (rules.get(spec.source, "dpt") if plain else None), name


@pytest.mark.parametrize("name", ["depth_anything_v2_vits", "dpt_base_depth", "dpt_hybrid_384", "dpt_beit_base_384"])
def test_published_vits_take_any_size_from_one_stored_grid(name):
    with torch.device("meta"):
        model, sized = published.build(name), published.build(name, img_size=(224, 320))
    for built in (model, sized):
        assert built.backbone.fixed_size is None
        assert type(built.backbone.model).__name__ in ("PlainViT", "AnySizeBeit")
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in sized.state_dict().items()}, "one file fits both as it is"


def test_an_unknown_rule_and_a_model_without_positions_are_refused():
    with pytest.raises(ValueError, match="positions is 'bicubic'; use one of dpt, dinov2, mmsegmentation"):
        FeatureBackbone("vit_tiny_patch16_224", depth=1, positions="bicubic")
    with pytest.raises(ValueError, match="not for ResNet"):
        FeatureBackbone("resnet18", positions="dpt")
    with pytest.raises(ValueError, match="not for Beit"):
        follow(Beit(embed_dim=8, depth=1, num_heads=1), "dpt")  # absolute positions


def test_grids_of_one_count_are_told_apart():
    beit = Beit(img_size=64, embed_dim=16, depth=1, num_heads=2, use_abs_pos_emb=False, use_rel_pos_bias=True)
    model = follow(randomised(beit), "dpt")
    wide, high = torch.randn(1, 3, 32, 128), torch.randn(1, 3, 128, 32)
    with torch.no_grad():
        assert math.prod(wide.shape) == math.prod(high.shape)
        model(wide)
        first = model(high)
        torch.testing.assert_close(model(high), first)
        assert not torch.allclose(model(high.mT.contiguous()), first)
