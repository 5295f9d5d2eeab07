"""STViT against the authors' code, and its sampling against the definition written out."""

import golden
import parity
import pytest
import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones.stvit import Block, STViT, SuperTokenAttention
from weights.convert import stvit as convert

KERNELS = ("fold.weights",)  # frozen identities


# What else the authors' constructor takes. Training only: drop rates, init_values (our initial scale is theirs, 1e-6),
# use_checkpoint and checkpoint_num (set_grad_checkpointing), freeze_bn. qk_scale: None, d^-0.5, is all that they publish.
IGNORED = ("drop_rate", "attn_drop_rate", "drop_path_rate", "init_values", "use_checkpoint", "checkpoint_num", "freeze_bn")


def from_official(kwargs: dict) -> STViT:
    """The model that the authors' constructor arguments describe."""
    names = {"embed_dim": "dims", "num_heads": "heads", "n_iter": "iterations", "stoken_size": "super_tokens"}
    names |= {"layerscale": "layer_scale"}
    args = {names.get(key, key): value for key, value in kwargs.items() if key not in IGNORED}
    assert args.pop("qk_scale", None) is None, "a scale of its own has no published model"
    return STViT(**args)


def tensors_of(model: STViT, image: Tensor) -> dict[str, Tensor]:
    final, maps = model.forward_intermediates(image)
    found = {f"stage/{i}": x for i, x in enumerate(maps)}
    pre_logits = model.forward_head(final, pre_logits=True)
    return found | {"extra/stem": model.patch_embed(image), "extra/pre_logits": pre_logits, "output": model(image)}


@pytest.mark.parametrize("case", golden.cases("stvit", exclude="stvit_op"))
def test_every_stored_tensor_is_reproduced(case):
    parity.check_model(from_official(golden.load(case)[0]["kwargs"]), case, tensors_of)


def part(kwargs: dict) -> nn.Module:
    attn = SuperTokenAttention(
        kwargs["dim"],
        kwargs.get("num_heads", 8),
        to_2tuple(kwargs["stoken_size"]),
        kwargs["n_iter"],
        kwargs.get("qkv_bias", False),
        kwargs.get("refine", True),
    )
    if kwargs["cls"] == "StokenAttention":
        return attn
    return Block(kwargs["dim"], attn, kwargs["mlp_ratio"], kwargs.get("layerscale", False), drop_path=0.0)


@pytest.mark.parametrize(("fixture", "case"), parity.cases_of("stvit_op"))
def test_parts_and_their_gradients(fixture, case):
    kwargs = golden.load(fixture)[0]["cases"][case]["kwargs"]
    inside = "attn." if kwargs["cls"] == "StokenAttention" else ""
    names = f"layers.0.blocks.0.{inside}", f"stages.0.blocks.0.{inside}"
    parity.check_part(part(kwargs), fixture, case, lambda state: parity.native_names(state, convert, *names))


@pytest.mark.parametrize("variant", golden.keys("stvit"))
def test_a_published_model(variant):
    parity.check_published("stvit", variant, variant, ignored=KERNELS, uncounted=KERNELS)


def by_loops(pixels: Tensor, size: tuple[int, int], iterations: int) -> Tensor:
    """Sampling and scattering of one C H W map, pixel by pixel, written from the paper's text."""
    dim, height, width = pixels.shape
    rows, columns = -(-height // size[0]), -(-width // size[1])
    padded = torch.zeros(dim, rows * size[0], columns * size[1], dtype=pixels.dtype)
    padded[:, :height, :width] = pixels
    places = [(y, x) for y in range(padded.shape[1]) for x in range(padded.shape[2])]
    around = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    grid = padded.unflatten(2, (columns, size[1])).unflatten(1, (rows, size[0])).mean((2, 4))

    def token(grid: Tensor, y: int, x: int) -> Tensor:
        inside = 0 <= y < rows and 0 <= x < columns
        return grid[:, y, x] if inside else torch.zeros(dim, dtype=pixels.dtype)

    for _ in range(iterations):
        shares = {}
        for y, x in places:
            products = [padded[:, y, x] @ token(grid, y // size[0] + a, x // size[1] + b) for a, b in around]
            shares[y, x] = (torch.stack(products) * dim**-0.5).softmax(0)
        sums, totals = torch.zeros_like(grid), torch.full((rows, columns), 1e-12, dtype=pixels.dtype)
        for (y, x), share in shares.items():
            for part, (a, b) in zip(share, around):
                r, c = y // size[0] + a, x // size[1] + b
                if 0 <= r < rows and 0 <= c < columns:
                    sums[:, r, c] += part * padded[:, y, x]
                    totals[r, c] += part
        grid = sums / totals
    out = torch.zeros_like(padded)
    for (y, x), share in shares.items():
        for part, (a, b) in zip(share, around):
            out[:, y, x] += part * token(grid, y // size[0] + a, x // size[1] + b)
    return out[:, :height, :width]


@pytest.mark.parametrize(("shape", "size"), [((5, 7), (2, 3)), ((4, 4), (4, 4)), ((3, 9), (1, 2)), ((6, 2), (8, 3))], ids=str)
@pytest.mark.parametrize("iterations", [1, 2])
def test_sampling_is_the_papers_pixel_by_pixel(shape, size, iterations):
    x = torch.randn(2, 6, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampling = SuperTokenAttention(6, 1, size, iterations, refine=False)
    expected = torch.stack([by_loops(image, size, iterations) for image in x])
    torch.testing.assert_close(sampling(x), expected)
    torch.testing.assert_close(sampling(x.contiguous(memory_format=torch.channels_last)), expected)


def test_memory_grows_with_the_pixels_and_not_with_their_square():
    """No tensor of an operation has as many entries as there are pairs of pixels."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(leaf.numel() for leaf in tree_leaves(out) if torch.is_tensor(leaf))
            return out

    attn = SuperTokenAttention(8, 1, (8, 8))
    x = torch.randn(1, 8, 128, 128, requires_grad=True)
    with Sizes():
        attn(x).sum().backward()
    assert max(sizes) <= 9 * x.numel(), "at most nine shares or neighbours a pixel"


def test_the_names_have_the_papers_costs():
    """GMACs at 224 of the table in the authors' README."""
    from torch.utils.flop_counter import FlopCounterMode

    for name, published in {"stvit_small": 4.35, "stvit_base": 9.84, "stvit_large": 15.56}.items():
        model = timm.create_model(name, device="meta").eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224, device="meta"))
        assert counter.get_total_flops() / 2e9 == pytest.approx(published, rel=0.02), name
