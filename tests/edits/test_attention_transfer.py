"""Attention transfer beyond the authors' case: other kinds of ViT, other depths and widths, refusals, and a whole run."""

import copy

import pytest
import timm
import torch
from torchvision.models.feature_extraction import create_feature_extractor
from vits import small

from backbones.analysis.attention import attention_statistics
from backbones.attention_transfer import KINDS, block_pairs, copy_attention, learn, teach

VITS = ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224", "vit_base_patch16_sapiens2"]


@pytest.mark.parametrize("name", VITS)
def test_a_model_has_nothing_to_learn_from_itself_and_copies_itself(name):
    plain, x = small(name)
    for kind in KINDS[1:]:
        student = copy.deepcopy(plain)
        pairs = learn(student, plain, kind)
        output, apart = student(x, teach(plain, x, kind, pairs))
        assert apart.abs().max() < 1e-10
        torch.testing.assert_close(output, plain(x), atol=1e-5, rtol=1e-5)
        assert torch.equal(student(x), plain(x)) and student.state_dict().keys() == plain.state_dict().keys()
    for kind in KINDS:
        copier = copy_attention(copy.deepcopy(plain), copy.deepcopy(plain), kind, 2)
        torch.testing.assert_close(copier(x), plain(x), atol=1e-5, rtol=1e-5)
        copier.train()
        assert not copier.guide.training and copier.blocks.training
        copier(x).square().sum().backward()
        idle = [key for key, p in copier.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle  # a process group would wait for them


def test_students_are_traced_as_plain_models_are():
    plain, x = small("vit_tiny_patch16_224")
    student = copy.deepcopy(plain)
    learn(student, plain)
    for mode in (True, False):
        traced = create_feature_extractor(student.train(mode), ["blocks.1", "head"])
        assert torch.equal(traced(x)["head"], plain.train(mode)(x))


def test_teachers_of_another_depth_and_width():
    assert block_pairs(4, 4, 3) == [0, 1, 2]  # the authors'
    assert block_pairs(6, 12) == [1, 3, 5, 7, 9, 11] and block_pairs(4, 2) == [0, 0, 0, 1] and block_pairs(3, 5, 2) == [0, 2]
    student, x = small("vit_tiny_patch16_224")
    teacher, _ = small("vit_tiny_patch16_224", seed=1, depth=5, embed_dim=64)
    pairs = learn(student, teacher)
    taught = teach(teacher, x, "attention", pairs)
    grads = []
    for enabled in (False, True):
        student.set_grad_checkpointing(enabled)
        student.zero_grad()
        student(x, taught)[1].sum().backward()
        grads.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    rows = [-(row * row.clamp_min(1e-30).log()).sum(-1).mean() for row in taught]
    assert student(x, taught)[1].mean() > torch.stack(rows).sum()  # a cross-entropy is at least the entropy
    with torch.autocast("cpu", torch.bfloat16):
        assert student(x, taught)[1].dtype == torch.float32
    assert attention_statistics(student, x).images == 2  # a student is analysed as any ViT
    with pytest.raises(ValueError, match="takes its attention from another model"):
        attention_statistics(copy_attention(small("vit_tiny_patch16_224")[0], teacher), x)


@pytest.mark.parametrize(
    ("teacher", "kind", "message"),
    [
        ({"num_heads": 4}, "attention", "block 0 has 2, the teacher's 0 has 4"),
        ({"embed_dim": 64}, "keys", "has 24 channels, the teacher's 0 has 32; 'attention' needs none"),
        ({"reg_tokens": 2}, "attention", "the student has prefix tokens 1, the teacher 3"),
        ({"img_size": (32, 32)}, "attention", r"a grid of patches \(4, 5\), the teacher \(2, 2\)"),
        ({"patch_drop_rate": 0.5}, "attention", "the teacher drops patches"),
        ({}, "logits", "knows attention, queries, keys, values, got 'logits'"),
    ],
    ids=["heads", "width", "prefix", "grid", "patch dropout", "kind"],
)
def test_what_does_not_fit_is_said(teacher, kind, message):
    student, _ = small("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=message):
        learn(student, small("vit_tiny_patch16_224", **teacher)[0], kind)


def test_other_models_and_numbers_are_refused():
    student, _ = small("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="ResNet is not one of"):
        learn(student, timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match="takes 1 to 3 blocks of this student, got 4"):
        copy_attention(student, small("vit_tiny_patch16_224")[0], blocks=4)
