"""`zoo bench heads`: what each dense head costs, alone and within a model, beside other libraries' heads on the same features.

The features are those of a 512 x 512 image: the pyramid of a Swin-T, or four maps of a ViT-S for heads that read tokens. Widths
are the same on both sides of a comparison, so the arithmetic is, except where a row says otherwise; batch 1, dropout and batch
norm as in evaluation (a pooled map of one image has no batch statistics). Peers are optional; one that is missing is named.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from heads import HEADS, FeatureBackbone, Head
from heads.sizes import on_meta
from train.bench.clock import in_own_process, measure, one_thread, peak_resident, shown, training_step
from train.checks import require_known

CLASSES = 150
PYRAMID = ("swin_t", [96, 192, 384, 768], [4, 8, 16, 32])  # backbone, channels, strides
TOKENS = ("vit_small_patch16_224", [384] * 4, [16] * 4)


@dataclass
class Case:
    """A head with its arguments, the features it gets, and who else has it: name -> function of (channels) -> module."""

    title: str
    head: str
    args: dict[str, Any] = field(default_factory=dict)
    features: tuple[str, list[int], list[int]] = PYRAMID
    peers: dict[str, Callable[[list[int]], nn.Module]] = field(default_factory=dict)

    def variants(self) -> dict[str, Callable[[list[int]], nn.Module]]:
        head = HEADS[self.head]
        return {"ours": lambda channels: Scored(head(channels, head.only_channels or CLASSES, **self.args)), **self.peers}


class Scored(nn.Module):
    """A head and its scores: list of maps -> B K h w, whatever the head returns."""

    def __init__(self, head: Head):
        super().__init__()
        self.head = head

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.head.scores(self.head(maps))


class Peer(nn.Module):
    """A decoder of segmentation_models_pytorch and its classifier, as a head: list of maps -> B K h w, without a last resize.

    Args:
        decoder: reads the maps.
        classifier: reads what the decoder gives.
        padding: the decoder also counts an image and a map of stride 2, which it does not read but for the image's size.
        tokens: the decoder takes prefix tokens beside the maps.
    """

    def __init__(self, decoder: nn.Module, classifier: nn.Module, padding: bool = True, tokens: bool = False):
        super().__init__()
        self.decoder, self.classifier, self.padding, self.tokens = decoder, classifier, padding, tokens

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        maps = list(maps)
        if self.padding:
            height, width = (4 * n for n in maps[0].shape[-2:])
            maps = [maps[0].new_empty(1, 0, height, width), maps[0].new_empty(1, 0, height // 2, width // 2), *maps]
        return self.classifier(self.decoder(maps, [None] * len(maps)) if self.tokens else self.decoder(maps))


def smp_upernet(channels: list[int]) -> nn.Module:
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    return Peer(UPerNetDecoder([3, 0, *channels], decoder_channels=256), nn.Conv2d(256, CLASSES, 1))


def smp_segformer(channels: list[int]) -> nn.Module:
    from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder

    return Peer(SegformerDecoder([3, 0, *channels], segmentation_channels=256), nn.Conv2d(256, CLASSES, 1))


def smp_fpn(channels: list[int]) -> nn.Module:
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

    decoder = FPNDecoder([3, 0, *channels], pyramid_channels=256, segmentation_channels=128)
    return Peer(decoder, nn.Conv2d(128, CLASSES, 1))


def smp_dpt(channels: list[int]) -> nn.Module:
    from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder, DPTSegmentationHead

    decoder = DPTDecoder(channels, [16] * 4, False, "ignore", intermediate_channels=(256, 512, 1024, 1024))
    return Peer(decoder, DPTSegmentationHead(256, CLASSES), padding=False, tokens=True)


def mmseg_head(kind: str, maps: Sequence[int], **args: Any) -> nn.Module:
    from heads import mmseg

    args = {"in_channels": list(maps), "in_index": list(range(len(maps))), "num_classes": CLASSES, **args}
    return mmseg.MODELS.build({"type": f"mmseg.{kind}", "norm_cfg": {"type": "BN"}, "align_corners": False, **args})


def mmseg_upernet(channels: list[int]) -> nn.Module:
    return mmseg_head("UPerHead", channels, channels=256)


def mmseg_segformer(channels: list[int]) -> nn.Module:
    return mmseg_head("SegformerHead", channels, channels=256)


def mmseg_fcn(channels: list[int]) -> nn.Module:
    return mmseg_head("FCNHead", channels, in_channels=channels[2], in_index=2, channels=256, num_convs=1, concat_input=False)


def mmseg_fpn(channels: list[int]) -> nn.Module:
    from heads import mmseg

    neck = mmseg.MODELS.build({"type": "mmseg.FPN", "in_channels": channels, "out_channels": 256, "num_outs": len(channels)})
    return nn.Sequential(neck, mmseg_head("FPNHead", [256] * 4, channels=128, feature_strides=[4, 8, 16, 32]))


class HuggingFaceMask2Former(nn.Module):
    """transformers' Mask2Former without its backbone: pixel decoder, transformer, classes, and the same scores as ours."""

    def __init__(self, channels: list[int]):
        from transformers import Mask2FormerConfig
        from transformers.models.mask2former import modeling_mask2former as code

        super().__init__()
        config = Mask2FormerConfig()
        config.num_labels = CLASSES
        self.decoder = code.Mask2FormerPixelDecoder(config, feature_channels=channels)
        self.transformer = code.Mask2FormerTransformerModule(in_features=config.feature_size, config=config)
        self.classify = nn.Linear(config.hidden_dim, CLASSES + 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = self.decoder(list(maps), output_hidden_states=False)
        found = self.transformer(
            multi_scale_features=levels.multi_scale_features,
            mask_features=levels.mask_features,
            output_hidden_states=True,
            output_attentions=False,
        )
        # every prediction is classified, as there in training and evaluation alike, and as ours
        classes = [self.classify(states.transpose(0, 1)) for states in found.intermediate_hidden_states]
        share = classes[-1].softmax(-1)[..., :-1]
        return torch.einsum("bnk,bnhw->bkhw", share, found.masks_queries_logits[-1].sigmoid())


DPT = {"norm": True, "predictor": "segmentation", "fusion": "double", "reassemble": [256, 512, 1024, 1024], "one_scale": True}
CASES = [
    Case("linear", "linear"),
    Case("fcn", "fcn", peers={"mmseg FCNHead": mmseg_fcn}),
    Case("fpn", "fpn", peers={"mmseg FPN, FPNHead": mmseg_fpn}),
    Case("fpn, not smooth", "fpn", {"smooth": False}, peers={"smp FPN (group norm)": smp_fpn}),
    Case(
        "upernet, 256",
        "upernet",
        {"width": 256},
        peers={"mmseg UPerHead": mmseg_upernet, "smp UPerNet (+ 4 norms)": smp_upernet},
    ),
    Case("segformer", "segformer", peers={"mmseg SegformerHead": mmseg_segformer, "smp Segformer": smp_segformer}),
    Case("dpt, segmentation", "dpt", DPT, TOKENS, {"smp DPT": smp_dpt}),
    Case("dpt, depth", "dpt", {"one_scale": True}, TOKENS),
    Case("sdt", "sdt", features=TOKENS),
    Case("glpn", "glpn"),
    Case("mask2former", "mask2former", peers={"transformers Mask2Former": HuggingFaceMask2Former}),
    Case("kmax", "kmax"),
    Case("polymax", "polymax"),
    Case("monodepth2", "monodepth2"),
    Case("lite_mono", "lite_mono"),
    Case("zoedepth", "zoedepth"),
]


def cases_of(names: Sequence[str]) -> list[int] | None:
    """Positions in CASES of the heads of these names; None for no name, which means all. ValueError for an unknown name."""
    for name in names:
        require_known("zoo bench heads", name, HEADS)
    return [index for index, case in enumerate(CASES) if case.head in names] if names else None


def maps_of(case: Case, size: tuple[int, int], device: str) -> list[Tensor]:
    """The features of one image, with gradients, as a backbone that trains would give them."""
    _, channels, strides = case.features
    sizes = [[-(-n // stride) for n in size] for stride in strides]
    return [torch.randn(1, c, *hw, device=device, requires_grad=True) for c, hw in zip(channels, sizes, strict=True)]


def bench_heads(
    size: tuple[int, int] = (512, 512),
    rounds: int = 5,
    device: str = "cpu",
    training: bool = True,
    memory: bool = True,
    cases: Iterable[int] | None = None,
) -> list[dict[str, str]]:
    """A row per head and peer: multiply-adds, times and memory, ours beside the peer's.

    Ratios are of the minima; for ours there is the share of the forward time that the head has in the model whose features it
    got. ValueError for a size that the peers cannot take.

    Args:
        size: of the image.
        rounds: interleaved.
        device: "cpu" or "cuda".
        training: time a step with the backward pass too.
        memory: measure the peak memory too.
        cases: positions in CASES; None: all.
    """
    if any(n % 32 for n in size):
        raise ValueError(f"the peers take sizes that 32 divides, got {size[0]} x {size[1]}")
    chosen = range(len(CASES)) if cases is None else cases
    return [row for index in chosen for row in bench_case(index, size, rounds, device, training, memory)]


def bench_case(
    index: int, size: tuple[int, int], rounds: int, device: str, training: bool, memory: bool
) -> list[dict[str, str]]:
    """The rows of one head and its peers. RuntimeError if a peer's output is of another size, which nothing would compare.

    Args:
        index: position in CASES.
        size: of the image.
        rounds: interleaved.
        device: "cpu" or "cuda".
        training: time a step with the backward pass too.
        memory: measure the peak memory too.
    """
    case = CASES[index]
    maps, images = maps_of(case, size, device), torch.randn(1, 3, *size, device=device)
    backbone = FeatureBackbone(case.features[0], img_size=size).to(device).eval()
    modules, absent = {}, {}
    for name, build in case.variants().items():
        try:
            modules[name] = build(case.features[1]).to(device).eval()
        except ImportError as error:
            absent[name] = str(error).partition(":")[0]
    calls = {name: functools.partial(module, maps) for name, module in modules.items()}
    with torch.no_grad():
        shapes = {name: call().shape for name, call in calls.items()}
        forward = measure({**calls, "backbone": functools.partial(backbone, images)}, rounds, device)
    if len(set(shapes.values())) > 1:
        raise RuntimeError(f"{case.title}: outputs differ in size: {', '.join(f'{k} {tuple(v)}' for k, v in shapes.items())}")
    both = {}
    if training:
        grad = torch.randn(shapes["ours"], device=device)
        steps = {key: training_step(calls[key], grad, [*maps, *module.parameters()]) for key, module in modules.items()}
        both = measure(steps, rounds, device)
    rows = []
    for name, module in modules.items():
        ours = name == "ours"
        first, second = peak_memory(index, name, size, device) if memory else ("-", "-")
        share = forward[name][1] / (forward[name][1] + forward["backbone"][1])
        rows.append(
            {
                "head": case.title if ours else "",
                "whose": name,
                "G mult-adds": f"{multiply_adds(module, maps):.1f}",
                "forward ms (min)": shown(forward[name]),
                "ours / it": "" if ours else f"{forward['ours'][1] / forward[name][1]:.2f}",
                "with backward ms (min)": shown(both[name]) if both else "-",
                "ours / it ": "" if ours or not both else f"{both['ours'][1] / both[name][1]:.2f}",
                "MB": first,
                "with backward": second,
                "of the model": f"{100 * share:.0f} %" if ours else "",
            }
        )
    return rows + [{**dict.fromkeys(rows[0], ""), "whose": f"{name}: {why}"} for name, why in absent.items()]


def multiply_adds(module: nn.Module, maps: list[Tensor]) -> float:
    """Of one forward, in G: convolutions and matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta(module)([m.detach().to("meta") for m in maps])
    return counter.get_total_flops() / 2e9


def peak_memory(index: int, name: str, size: tuple[int, int], device: str) -> tuple[str, str]:
    """MB that a forward, and a forward with backward, add to the peak; on a CPU in a process of its own.

    Args:
        index: position in CASES.
        name: of the head or peer in that case.
        size: of the image.
        device: "cpu" or "cuda".
    """
    if device != "cuda" and sys.platform != "linux":
        return "-", "-"
    call = f"added_peak({index}, {name!r}, {tuple(size)}, {device!r})"
    first, second = json.loads(in_own_process("train.bench.heads", call, f"measuring the memory of {name!r}"))
    return f"{first:.0f}", f"{second:.0f}"


def added_peak(index: int, name: str, size: tuple[int, int], device: str) -> None:
    """Prints what peak_memory returns.

    Args:
        index: position in CASES.
        name: of the head or peer in that case.
        size: of the image.
        device: "cpu" or "cuda".
    """
    case = CASES[index]
    module = case.variants()[name](case.features[1]).to(device).eval()
    small, maps = maps_of(case, (64, 64), device), maps_of(case, size, device)
    on_cuda = device == "cuda"
    with one_thread():
        module(small).sum().backward()  # loads libraries, and makes the parameters' gradients
        before, peaks = torch.cuda.memory_allocated() if on_cuda else peak_resident(), []
        for backward in (False, True):
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
            with torch.set_grad_enabled(backward):
                output = module(maps)
            if backward:
                output.backward(torch.ones_like(output))
            peaks.append(((torch.cuda.max_memory_allocated() if on_cuda else peak_resident()) - before) / 1e6)
    print(json.dumps(peaks))
