"""Checkpoints of Hugging Face's transformers: the same outputs from the same weights, whole dense models included.

Names as the classes have them (transformers 5) and as the hub's files do (save_pretrained).
"""

import pytest
import timm
import torch
import torch.nn.functional as F

import backbones  # noqa: F401
import weights
from heads import DensePredictor
from weights.convert import huggingface

hf = pytest.importorskip("transformers")

VIT = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 64}
DINO = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
MIT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 1, 2, 2]}
SWIN = {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64}
OUT = ["stage1", "stage2", "stage3", "stage4"]
FUSION = {"neck_hidden_sizes": [4, 6, 8, 12], "fusion_hidden_size": 8}
TIMM_VIT = {"embed_dim": 24, "depth": 4, "num_heads": 2}
PYRAMID = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "sr_ratios": (8, 4, 2, 1)}
TIMM_SWIN = {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight drawn, as zeros and ones hide what is not loaded."""
    torch.manual_seed(0)
    ones = ("norm", "running_var", "lambda", "scale")
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                value.normal_(0, 0.2)
                if any(word in name for word in ones) and not name.endswith(("bias", "running_mean")):
                    value.add_(1).abs_()
    return model.eval()


def dense(backbone: str, head: str, classes: int, head_args: dict, size=None, aux=None, **backbone_args) -> DensePredictor:
    aux_args = {"aux_head": "fcn", "aux_args": aux} if aux else {}
    return DensePredictor(backbone, head, classes, head_args, backbone_args=backbone_args, img_size=size, **aux_args)


def logits(output) -> torch.Tensor:
    return output.logits


def tokens(output) -> torch.Tensor:
    return output.last_hidden_state


def depth(output) -> torch.Tensor:
    return output.predicted_depth[:, None]


def run(model, images) -> torch.Tensor:
    return model(images)


def features(model, images) -> torch.Tensor:
    return model.forward_features(images)


CASES = {  # name: (theirs, ours, output of theirs, output of ours)
    "swin": (
        lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN | {"image_size": 128}, num_labels=5)),
        lambda: timm.create_model("swin_t", **TIMM_SWIN, img_size=128, num_classes=5),
        logits,
        run,
    ),
    "poolformer": (
        lambda: hf.PoolFormerForImageClassification(
            hf.PoolFormerConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=5)
        ),
        lambda: timm.create_model("poolformer_s12_gn", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5),
        logits,
        run,
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT, num_labels=5)),
        lambda: timm.create_model("vit_tiny_patch16_224", **TIMM_VIT, mlp_ratio=2, img_size=64, num_classes=5),
        logits,
        run,
    ),
    "beit": (
        lambda: hf.BeitForImageClassification(
            hf.BeitConfig(**VIT, use_relative_position_bias=True, use_absolute_position_embeddings=False, num_labels=5)
        ),
        lambda: timm.create_model("beit_base_patch16_224", **TIMM_VIT, mlp_ratio=2, img_size=64, num_classes=5),
        logits,
        run,
    ),
    "dinov2": (
        lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)),
        lambda: timm.create_model("vit_small_patch14_dinov2", **TIMM_VIT, img_size=70),
        tokens,
        features,
    ),
    "dinov2_gated": (
        lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO, use_swiglu_ffn=True)),
        lambda: timm.create_model("vit_giant_patch14_dinov2", **TIMM_VIT, img_size=70),
        tokens,
        features,
    ),
    "dinov2_registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO)),
        lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **TIMM_VIT, img_size=70),
        tokens,
        features,
    ),
    "pvt_v2": (
        lambda: hf.PvtV2ForImageClassification(hf.PvtV2Config(**MIT, mlp_ratios=[4, 4, 4, 4], num_labels=5)),
        lambda: timm.create_model("pvt_v2_b0", **PYRAMID, mlp_ratios=(4, 4, 4, 4), num_classes=5),
        logits,
        run,
    ),
    "segformer": (
        lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**MIT, decoder_hidden_size=16, num_labels=5)),
        lambda: dense("pvt_v2_b0", "segformer", 5, {"width": 16, "linear": True}, **PYRAMID, mlp_ratios=(4, 4, 4, 4)),
        lambda output: F.interpolate(output.logits, scale_factor=4, mode="bilinear"),
        run,
    ),
    "glpn": (
        lambda: hf.GLPNForDepthEstimation(hf.GLPNConfig(**MIT, decoder_hidden_size=8)),
        lambda: dense("pvt_v2_b0", "glpn", 1, {"width": 8}, **PYRAMID, mlp_ratios=(4, 4, 4, 4)),
        depth,
        lambda model, images: 10 * model(images).sigmoid(),
    ),
    "dpt": (
        lambda: hf.DPTForDepthEstimation(hf.DPTConfig(**VIT, **FUSION, patch_size=16, backbone_out_indices=[0, 1, 2, 3])),
        lambda: dense(
            "vit_base_patch16_384",
            "dpt",
            1,
            {"width": 8, "readout": "project", "reassemble": (4, 6, 8, 12), "fusion": "double", "predictor_widths": (4, 32)},
            size=64,
            **TIMM_VIT,
            mlp_ratio=2,
            out_indices=(0, 1, 2, 3),
            positions="dpt",
        ),
        depth,
        lambda model, images: model(images).relu(),
    ),
    "depth_anything": (
        lambda: hf.DepthAnythingForDepthEstimation(
            hf.DepthAnythingConfig(
                backbone_config=hf.Dinov2Config(**DINO, out_features=OUT, reshape_hidden_states=False),
                patch_size=14,
                reassemble_hidden_size=24,
                head_hidden_size=32,
                **FUSION,
            )
        ),
        lambda: dense(
            "vit_small_patch14_dinov2",
            "dpt",
            1,
            {"width": 8, "reassemble": (4, 6, 8, 12), "patch_size": 14},
            size=70,
            **TIMM_VIT,
            out_indices=(0, 1, 2, 3),
            norm=True,
            positions="dinov2",
        ),
        depth,
        lambda model, images: model(images).relu(),
    ),
    "upernet_swin": (
        lambda: hf.UperNetForSemanticSegmentation(
            hf.UperNetConfig(
                backbone_config=hf.SwinConfig(**SWIN, out_features=OUT),
                hidden_size=16,
                auxiliary_in_channels=32,
                auxiliary_channels=8,
                num_labels=5,
            )
        ),
        lambda: dense("swin_t", "upernet", 5, {"width": 16}, aux={"width": 8}, **TIMM_SWIN, feature_norms=True),
        logits,
        run,
    ),
}


@pytest.mark.parametrize("names", ["class", "file"])
@pytest.mark.parametrize("case", list(CASES))
def test_the_same_weights_give_the_same_outputs(case, names, tmp_path):
    theirs, ours, output, call = CASES[case]
    theirs, ours = drawn(theirs()), ours().eval()
    if names == "class":
        source = theirs.state_dict()
    else:
        theirs.save_pretrained(tmp_path)
        source = tmp_path / "model.safetensors"
    report = weights.load_checkpoint(ours, source)
    assert report.format == "huggingface" and not report.missing and not report.untouched
    assert set(report.unexpected) <= {"norm.weight", "norm.bias", "mask_token"}, report.unexpected
    size = 70 if "dino" in case or case == "depth_anything" else 128 if case == "swin" else 64
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        want, got = output(theirs(pixel_values=images)), call(ours, images)
    assert want.std() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["segformer", "glpn", "dpt", "upernet_swin"])
def test_whole_dense_models_at_four_sizes(case):
    """transformers is a second reading of the authors' code: square and not, larger and smaller than the native size."""
    theirs, ours, output, call = CASES[case]
    if case == "upernet_swin":  # transformers shrinks windows to the maps of its native size: large enough that none shrinks

        def theirs():
            config = hf.SwinConfig(**SWIN | {"image_size": 256}, out_features=OUT)
            aux = {"auxiliary_in_channels": 32, "auxiliary_channels": 8}
            return hf.UperNetForSemanticSegmentation(
                hf.UperNetConfig(backbone_config=config, hidden_size=16, num_labels=5, **aux)
            )

    theirs, ours = drawn(theirs()), ours().eval()
    weights.load_checkpoint(ours, theirs.state_dict())
    square = [(side, side) for side in (64, 96, 128, 192)]  # transformers' DPT takes no others
    for size in square if case == "dpt" else [(128, 128), (160, 192), (128, 256), (224, 160)]:
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            want, got = output(theirs(pixel_values=images)), call(ours, images)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=lambda text, size=size: f"{case} at {size}: {text}")


@pytest.mark.parametrize("case", ["hugging_face_swin"])
def test_a_whole_swin_of_hugging_face(case):
    torch.manual_seed(0)
    config = hf.SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], num_labels=1000)
    theirs, ours = hf.SwinForImageClassification(config).eval(), timm.create_model("swin_t").eval()
    report = weights.load_checkpoint(ours, theirs.state_dict())
    assert len(report.loaded) == len(ours.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert (theirs(images).logits - ours(images)).abs().max() <= 1e-4


def test_a_family_that_is_not_read_is_recognised():
    state = {f"videomae.encoder.layer.{i}.attention.attention.query.weight": torch.ones(2, 2) for i in range(2)}
    assert huggingface.to_authors(state) is None
    with pytest.raises(ValueError, match="they are Hugging Face's names, of which these families are read: Swin"):
        weights.load_checkpoint(timm.create_model("nat_mini", embed_dim=16, depths=(1, 1, 1, 1)), state)
