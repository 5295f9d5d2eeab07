"""The loss of attention diversification, on any ViT."""

import pytest
import timm
import torch

from train.attention_diversity import attention_diversification, reading_attention


def test_it_is_one_where_all_look_alike_and_less_where_they_do_not():
    peaked = torch.zeros(2, 3, 6, 6)
    peaked[..., 0] = 1
    assert attention_diversification([peaked, peaked]).item() == pytest.approx(1, abs=1e-5)
    apart = torch.eye(6).expand(1, 1, 6, 6)
    assert attention_diversification([apart], threshold=0.5).item() == pytest.approx(6**-0.5, abs=1e-5)
    assert attention_diversification([apart]).item() == 0, "every entry of the average lies below the threshold"
    assert attention_diversification([peaked[:1]]).ndim == 0, "a batch of one"
    with pytest.raises(ValueError, match="no attention was read"):
        attention_diversification([])


def test_any_timm_vit_gives_its_attention_with_gradient_and_is_left_as_it_was():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)
    image = torch.randn(2, 3, 64, 64)
    expected = model(image)
    with reading_attention(model) as attentions:
        torch.testing.assert_close(model(image), expected, atol=1e-5, rtol=1e-4)
    assert [tuple(a.shape) for a in attentions] == [(2, 3, 17, 17)] * 2
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 3, 17))
    attention_diversification(attentions, threshold=1.0).backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    model(image)
    assert len(attentions) == 2 and all(block.attn.fused_attn for block in model.blocks)
    with pytest.raises(ValueError, match="no attention that can be read"), reading_attention(torch.nn.Linear(2, 2)):
        pass
