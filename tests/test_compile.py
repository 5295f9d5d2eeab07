"""torch.compile takes every family and every head in one graph: evaluation and training, float32 and bfloat16 autocast.

Dynamo alone finds what breaks a graph, so nothing is compiled here: its backend "eager" runs what it traced, and "explain"
words the reason of a break.
"""

import contextlib
import copy
import inspect

import families
import pytest
import timm
import torch
from torch import Tensor, nn

import backbones  # noqa: F401  (registers our models with timm)
from heads import HEADS, DensePredictor
from heads.base import tensors
from heads.matrix import NARROW
from train.randomness import by_position, drawn_for

MODES = pytest.mark.parametrize(
    ("training", "half"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["evaluation", "training", "evaluation in bfloat16", "training in bfloat16"],
)
PYRAMID = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
BACKBONES = {"a pyramid": ("poolformer_s12_gn", PYRAMID), "a plain ViT": ("test_vit", {"dynamic_img_size": True})}
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
QUICK = ["nat_mini", "swin_t", "mask2former"]


def small(name: str) -> nn.Module:
    """The family's narrow model with few blocks."""
    args = families.narrow(name)
    model = timm.create_model(name, device="meta", **args)
    staged = "depths" in inspect.signature(type(model).__init__).parameters
    shallow = {"depths": (1, *[1] * (len(model.stages) - 2), 2)} if staged else {"depth": 2}
    torch.manual_seed(0)
    return timm.create_model(name, **args, **shallow, num_classes=5, drop_path_rate=0.2)


def predictor(head: str, kind: str) -> nn.Module:
    """A narrow head on a small backbone."""
    name, args = BACKBONES[kind]
    torch.manual_seed(0)
    return DensePredictor(name, head, HEADS[head].only_channels or 3, NARROW.get(head, {"width": 16}), backbone_args=args)


def compiles_whole(model: nn.Module, image: Tensor, training: bool, half: bool) -> None:
    """One graph, and what it computes is what the model computes, with a gradient wherever the model has one."""
    torch._dynamo.reset()
    model = copy.deepcopy(model).train(training)
    by_position(model)  # as the training loop does, and the next lines too
    for module in model.modules():
        if hasattr(module, "begin_step"):
            module.begin_step(0, 4)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    outputs = []
    for function in (compiled, plain):
        torch.manual_seed(0)
        step = drawn_for(range(len(image))) if training else contextlib.nullcontext()
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=half), step:
            outputs.append(tensors(function(image)))
    assert len(outputs[0]) == len(outputs[1]) > 0
    for ours, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, expected)
    if training:
        for found in outputs:
            sum(out.float().square().mean() for out in found if out.requires_grad).backward()
        for (name, ours), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (ours.grad is None) == (expected.grad is None), name


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("name", families.every("kinds"))
def test_every_family_compiles_in_one_graph(name, training, half):
    compiles_whole(small(name), IMAGES, training, half)


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_compiles_in_one_graph(head, kind, training, half):
    compiles_whole(predictor(head, kind), IMAGES, training, half)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tiled", None])
@torch.no_grad()
def test_one_graph_of_nat_serves_every_image_size(backend):
    """dynamic=True: nothing follows an axis of open length position by position."""
    torch._dynamo.reset()
    graphs = []
    model = small("nat_mini").eval()
    for module in model.modules():
        if hasattr(module, "rpb"):
            module.backend = backend
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph, dynamic=True, fullgraph=True)
    for size in ((256, 320), (288, 416), (448, 224)):  # none of them is padded
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(image), model(image))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", QUICK)
def test_three_of_them_train_in_one_graph_in_bfloat16(name):
    compiles_whole(predictor(name, "a pyramid") if name in HEADS else small(name), IMAGES, True, True)
