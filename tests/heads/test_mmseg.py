"""Our backbones and heads under mmengine's Runner, in a configuration a user of mmsegmentation would write."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

import backbones  # noqa: F401  (registers the zoo's models with timm)
from heads import HEADS, DensePredictor

CAMVID = Path(__file__).resolve().parents[3] / "shared" / "data" / "camvid"
PACKAGES = ("mmseg", "mmengine", "mmcv")

CONFIG = """
custom_imports = dict(imports=["backbones", "heads.mmseg"])
default_scope = "mmseg"
classes = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
data = dict(
    type="BaseSegDataset", data_root={root!r}, img_suffix=".png", seg_map_suffix=".png", ignore_index=11,
    metainfo=dict(classes=classes, palette=[[20 * i, 0, 0] for i in range(11)]),
)
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(data_prefix=dict(img_path="train", seg_map_path="trainannot"), pipeline=[
        dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="Resize", scale=(192, 128)),
        dict(type="RandomCrop", crop_size=(64, 96)), dict(type="RandomFlip", prob=0.5), dict(type="PackSegInputs")], **data),
)
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(data_prefix=dict(img_path="val", seg_map_path="valannot"), pipeline=[
        dict(type="LoadImageFromFile"), dict(type="Resize", scale=(192, 128)), dict(type="LoadAnnotations"),
        dict(type="PackSegInputs")], indices=4, **data),
)
del data
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"], ignore_index=11)
model = dict(
    type="EncoderDecoder", backbone={backbone}, decode_head={decode_head}, auxiliary_head={auxiliary_head},
    data_preprocessor=dict(
        type="SegDataPreProcessor", mean=[110.0] * 3, std=[60.0] * 3, bgr_to_rgb=True, size=(64, 96), seg_pad_val=11),
    train_cfg=dict(), test_cfg=dict(mode="whole"),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=5e-3), clip_grad=dict(max_norm=1.0))
train_cfg = dict(type="IterBasedTrainLoop", max_iters=30, val_interval=30)
val_cfg = dict(type="ValLoop")
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1),
    checkpoint=dict(type="CheckpointHook", interval=30, by_epoch=False),
)
visualizer = dict(type="SegLocalVisualizer", vis_backends=[])
randomness = dict(seed=0)
log_level = "ERROR"
work_dir = {work_dir!r}
"""
POOLFORMER = "dict(type='ZooBackbone', backbone='poolformer_s12_gn', depths=(1, 1, 1, 1), dims=(16, 24, 32, 48))"
NAT = "dict(type='ZooBackbone', backbone='nat_mini', depths=(1, 1, 1, 1), embed_dim=16, num_heads=(1, 2, 4, 8))"
OURS = """dict(type='ZooHead', head='upernet', head_args=dict(width=16), in_channels=[16, 24, 32, 48], num_classes=11,
    ignore_index=11)"""
OUR_FCN = """dict(type='ZooHead', head='fcn', head_args=dict(width=16), in_channels=[16, 24, 32, 48], num_classes=11,
    ignore_index=11, loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4))"""
THEIRS = """dict(type='UPerHead', in_channels=[16, 32, 64, 128], in_index=[0, 1, 2, 3], channels=32, num_classes=11,
    ignore_index=11, dropout_ratio=0, norm_cfg=dict(type='BN'))"""


@pytest.fixture(scope="module")
def bridge() -> types.ModuleType:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'backbone-zoo[mmseg]'")
    return importlib.import_module("heads.mmseg")


@pytest.mark.parametrize(
    "parts", [(POOLFORMER, OURS, OUR_FCN), (NAT, THEIRS, "None")], ids=["upernet_on_poolformer", "UPerHead_on_nat"]
)
def test_mmengine_trains_and_evaluates_camvid(bridge, parts, tmp_path):
    if not CAMVID.is_dir():
        pytest.skip("the CamVid files are not at ../shared/data/camvid")
    from mmengine.config import Config
    from mmengine.runner import Runner

    backbone, decode_head, auxiliary_head = parts
    names = {"root": str(CAMVID), "work_dir": str(tmp_path / "run")}
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(backbone=backbone, decode_head=decode_head, auxiliary_head=auxiliary_head, **names))
    runner = Runner.from_cfg(Config.fromfile(file))
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner.train()

    losses = runner.message_hub.get_scalar("train/loss").data[0]
    assert len(losses) == 30 and losses[-3:].mean() < 0.9 * losses[:3].mean(), losses
    moved = [name for name, p in runner.model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 0.95 * len(before)  # all but what only a later step reaches
    assert (auxiliary_head == "None") == ("aux.loss_ce" not in " ".join(runner.message_hub.log_scalars))
    metrics = runner.val_loop.run()
    assert metrics.keys() >= {"mIoU", "mAcc", "aAcc"}
    assert metrics["aAcc"] > 40 and metrics["mIoU"] > 5, metrics  # per cent; building everywhere gives 31 and 2.8

    trained = {name: p.detach().clone() for name, p in runner.model.state_dict().items()}
    for p in runner.model.parameters():
        p.data.zero_()
    runner.load_checkpoint(str(tmp_path / "run" / "iter_30.pth"))
    torch.testing.assert_close(dict(runner.model.state_dict()), trained, rtol=0, atol=0)


def test_a_checkpoint_may_look_up_statistics_only(bridge):
    from mmengine.logging import HistoryBuffer

    assert bridge.statistic(HistoryBuffer, "mean") is HistoryBuffer.mean
    for owner, name in [(HistoryBuffer, "__init__"), (torch, "load")]:
        with pytest.raises(bridge.pickle.UnpicklingError, match=name):
            bridge.statistic(owner, name)


@pytest.mark.parametrize("head", [name for name, head in HEADS.items() if not head.returns_names])
def test_every_head_gives_what_it_gives_without_mmsegmentation(bridge, head):
    """The same weights in a DensePredictor and in mmsegmentation's segmentor: the same map."""
    from mmseg.registry import MODELS

    shape = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}
    classes = HEADS[head].only_channels or 5
    ours = DensePredictor("poolformer_s12_gn", head, classes, backbone_args=shape).eval()
    cfg = {"type": "ZooBackbone", "backbone": "poolformer_s12_gn"} | shape
    decode_head = {"type": "ZooHead", "head": head, "in_channels": [16, 24, 32, 48], "num_classes": classes}
    theirs = MODELS.build(
        {"type": "EncoderDecoder", "backbone": cfg, "decode_head": decode_head, "test_cfg": {"mode": "whole"}}
    ).eval()
    theirs.backbone.load_state_dict(ours.backbone.state_dict())
    theirs.decode_head.head.load_state_dict(ours.head.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        meta = {"img_shape": (64, 96), "ori_shape": (64, 96), "pad_shape": (64, 96)}
        torch.testing.assert_close(theirs.encode_decode(images, [meta]), ours(images))


@pytest.mark.parametrize("head, prefix_tokens", [("upernet", False), ("upernet", True), ("dpt", True)])
def test_a_plain_vit_works_too(bridge, head, prefix_tokens):
    from mmseg.registry import MODELS

    size = {"embed_dim": 32, "num_heads": 2, "depth": 4}
    backbone = MODELS.build(
        {"type": "ZooBackbone", "backbone": "vit_tiny_patch16_224", "prefix_tokens": prefix_tokens, "img_size": [64, 96]} | size
    )
    args = {"readout": "project"} if head == "dpt" else {}
    cfg = {"type": "ZooHead", "head": head, "in_channels": [32] * 4, "num_classes": 5, "head_args": args, "one_scale": True}
    out = MODELS.build(cfg)(backbone(torch.randn(2, 3, 64, 96)))
    assert out.shape[:2] == (2, 5) and out.shape[3] * 2 == out.shape[2] * 3
    if head == "dpt":
        with pytest.raises(ValueError, match="prefix_tokens=True"):
            MODELS.build(cfg)([torch.randn(1, 32, 4, 6)] * 4)


def test_images_it_would_pad_are_refused(bridge):
    backbone = bridge.ZooBackbone("vit_tiny_patch16_224", embed_dim=32, num_heads=2, depth=4)
    with pytest.raises(ValueError, match="pads images of 60 x 90 to 64 x 96"):
        backbone(torch.randn(1, 3, 60, 90))


def test_arguments_that_our_heads_do_not_have_are_refused(bridge):
    with pytest.raises(TypeError, match="norm_cfg"):
        bridge.ZooHead("fpn", [8, 8], 5, norm_cfg={"type": "SyncBN"})
    with pytest.raises(ValueError, match="did you mean 'upernet'"):
        bridge.ZooHead("upernett", [8, 8], 5)


def test_a_compiled_op_refuses_when_called_and_torch_ops_work(bridge):
    from mmcv import ops

    if not isinstance(sys.modules["mmcv._ext"], bridge.NotCompiled):
        pytest.skip("mmcv is compiled here, so nothing stands in for its ops")
    assert importlib.util.find_spec("mmcv._ext") is not None
    with pytest.raises(NotImplementedError, match="'sigmoid_focal_loss_forward' needs compiled mmcv"):
        ops.sigmoid_focal_loss(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))
    assert ops.point_sample(torch.ones(1, 2, 4, 4), torch.full((1, 3, 2), 0.5)).shape == (1, 2, 3)


def test_without_the_packages_the_error_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == "mmengine" else find(name))
    monkeypatch.delitem(sys.modules, "heads.mmseg", raising=False)
    with pytest.raises(ImportError, match=r"mmengine.*pip install backbone-zoo\[mmseg\]"):
        importlib.import_module("heads.mmseg")
