"""Mask2Former, backbone and all, beside transformers' with the same random weights, at several sizes."""

import pytest
import torch

import backbones  # noqa: F401  (registers swin_t)
import weights
from heads import DensePredictor
from weights.rules import rename_all

transformers = pytest.importorskip("transformers")

SWIN = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 2}
PIXEL = [  # transformers' names -> the authors', of the pixel decoder
    (r"^input_projections\.", "input_proj."),
    (r"^level_embed$", "transformer.level_embed"),
    (r"^encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"transformer.encoder.layers.\1.norm1."),
    (r"^encoder\.layers\.(\d+)\.final_layer_norm\.", r"transformer.encoder.layers.\1.norm2."),
    (r"^encoder\.layers\.(\d+)\.fc(\d)\.", r"transformer.encoder.layers.\1.linear\2."),
    (r"^encoder\.", "transformer.encoder."),
    (r"^(adapter|layer)_1\.0\.", r"\1_1."),
    (r"^(adapter|layer)_1\.1\.", r"\1_1.norm."),
    (r"^mask_projection\.", "mask_features."),
]
QUERIES = [  # and of the decoder of queries
    (r"^queries_embedder\.", "query_embed."),
    (r"^queries_features\.", "query_feat."),
    (r"^decoder\.layernorm\.", "decoder_norm."),
    (r"^decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.", r"mask_embed.layers.\1."),
    (r"^decoder\.layers\.(\d+)\.self_attn\.", r"transformer_self_attention_layers.\1.self_attn."),
    (r"^decoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"transformer_self_attention_layers.\1.norm."),
    (r"^decoder\.layers\.(\d+)\.cross_attn\.", r"transformer_cross_attention_layers.\1.multihead_attn."),
    (r"^decoder\.layers\.(\d+)\.cross_attn_layer_norm\.", r"transformer_cross_attention_layers.\1.norm."),
    (r"^decoder\.layers\.(\d+)\.fc(\d)\.", r"transformer_ffn_layers.\1.linear\2."),
    (r"^decoder\.layers\.(\d+)\.final_layer_norm\.", r"transformer_ffn_layers.\1.norm."),
]


def renamed(module: torch.nn.Module, rules: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    return {rename_all(name, rules): value for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def both():
    """(transformers' model, ours with its weights)."""
    torch.manual_seed(0)
    swin = transformers.SwinConfig(image_size=64, drop_path_rate=0.0, out_features=[f"stage{i}" for i in range(1, 5)], **SWIN)
    config = transformers.Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=48,
        dim_feedforward=40,
        num_attention_heads=4,
        encoder_layers=2,
        decoder_layers=4,
        num_queries=6,
    )
    config.num_labels = 5
    theirs = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for value in theirs.parameters():  # larger than their initialisation, so that every part shows
            value.normal_(std=0.3) if value.ndim > 1 else value.add_(torch.randn_like(value) * 0.1)
    head = {"width": 32, "mask_width": 32, "queries": 6, "heads": 4, "encoder_layers": 2, "encoder_ffn": 48}
    head |= {"decoder_layers": 3, "decoder_ffn": 40}
    ours = DensePredictor("swin_t", "mask2former", 5, head, backbone_args=SWIN | {"feature_norms": True, "multiple": 32}).eval()

    inside = theirs.model
    encoder = {name.removeprefix("swin."): value for name, value in inside.pixel_level_module.encoder.state_dict().items()}
    weights.load_checkpoint(ours.backbone.model, encoder, strict=False)
    state = {f"pixel_decoder.{name}": value for name, value in renamed(inside.pixel_level_module.decoder, PIXEL).items()}
    queries = renamed(inside.transformer_module, QUERIES)
    for i in range(config.decoder_layers - 1):
        stem = f"transformer_self_attention_layers.{i}.self_attn."
        for kind in ("weight", "bias"):
            queries[f"{stem}in_proj_{kind}"] = torch.cat([queries.pop(f"{stem}{part}_proj.{kind}") for part in "qkv"])
    queries |= {f"class_embed.{name}": value for name, value in theirs.class_predictor.state_dict().items()}
    ours.head.load_state_dict(state | {f"predictor.{name}": value for name, value in queries.items()})
    return theirs, ours


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (72, 100)], ids=["square", "wide", "padded"])
def test_the_whole_model_is_transformers_at_any_size(both, size):
    theirs, ours = both
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    rest = [-n % 32 for n in size]  # their image processor pads, right and bottom
    with torch.no_grad():
        found = ours.outputs(images)["main"]
        expected = theirs(torch.nn.functional.pad(images, (0, rest[1], 0, rest[0])), output_auxiliary_logits=True)
    pairs = [(found, expected.class_queries_logits, expected.masks_queries_logits)]
    aux = zip(found["aux"], expected.auxiliary_logits, strict=True)
    pairs += [(own, other["class_queries_logits"], other["masks_queries_logits"]) for own, other in aux]
    assert len(pairs) == 4
    for own, classes, masks in pairs:  # fp32, 5 blocks and 5 layers
        torch.testing.assert_close(own["class_logits"], classes, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(own["mask_logits"], masks, rtol=1e-3, atol=2e-3)
    assert tuple(ours(images).shape) == (2, 5, *size)
