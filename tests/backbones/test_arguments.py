"""The authors' constructor arguments: taken under their names, or answered by a sentence."""

import importlib

import golden
import pytest
import timm
import torch

from backbones.arguments import from_authors, taken

CLASSES = {  # beginning of fixtures of whole models -> file and class; the longest that fits counts
    "cvt": "cvt CvT",
    "fan": "fan FAN",
    "fcaformer": "fcaformer FcaFormer",
    "flatten_cswin": "flatten FlattenCSwin",
    "flatten_pvt": "flatten FlattenPVT",
    "flatten_swin": "flatten FlattenSwin",
    "hvt": "hvt HVT",
    "lit_smb": "lit LIT",
    "lit_ti": "lit LITTi",
    "litv2": "litv2 LITv2",
    "monodepth_lite_model": "monodepth LiteMono",
    "nat_isotropic": "nat NATIsotropic",
    "nat_vitrpb": "nat ViTRPB",
    "nat": "nat NAT",
    "pit": "pit PiT",
    "poolformer": "poolformer PoolFormer",
    "slab_cswin": "slab SlabCSwin",
    "slab_deit": "slab SlabDeiT",
    "slab_det_swin": "slab SlabSwin",
    "slab_pvt": "slab SlabPVT",
    "slab_swin": "slab SlabSwin",
    "sparsifiner_lvvit": "sparsifiner Sparsifiner",
    "sparsifiner_model": "sparsifiner Sparsifiner",
    "sparsifiner_train": "sparsifiner Sparsifiner",
    "sret": "sret SReT",
    "stvit": "stvit STViT",
    "swin": "swin Swin",
}
FIXTURES = [case for place in CLASSES for case in golden.cases(place) if isinstance(case, str) and "_op_" not in case]
TIMM = {"img_size", "out_indices"}  # what timm.create_model takes for every model of the zoo


@pytest.mark.parametrize("case", sorted(set(FIXTURES)))
def test_every_argument_of_a_fixture_is_taken_or_answered(case):
    file, name = CLASSES[max((place for place in CLASSES if case.startswith(place)), key=len)].split()
    cls = getattr(importlib.import_module(f"backbones.{file}"), name)
    for key, value in golden.load(case)[0]["kwargs"].items():
        try:
            (ours,) = from_authors(case, cls, {key: value})
        except TypeError as error:
            assert f"`{key}` " in str(error) and str(error).startswith(case), error
            assert key not in taken(cls), f"{name} takes {key} and refuses it"
            continue
        assert ours in taken(cls) | TIMM, f"{name} neither takes nor answers the authors' {key}"


TINY = {"num_classes": 3}


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        (
            "stvit_small",
            {"embed_dim": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "stoken_size": (4, 2, 1, 1)},
            {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "heads": (1, 1, 2, 2), "super_tokens": (4, 2, 1, 1)},
        ),
        (
            "flatten_cswin_t",
            {"depth": (1, 1, 1, 1), "embed_dim": 8, "img_size": 64, "split_at": 64, "la_split_size": "16-8-4-2"},
            {"depths": (1, 1, 1, 1), "embed_dim": 8, "img_size": 64, "split_at": 64, "la_split_size": (16, 8, 4, 2)},
        ),
        (
            "slab_pvt_t",
            {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "img_size": 32, "la_sr_ratios": "8421"},
            {"dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "img_size": 32, "la_sr_ratios": (8, 4, 2, 1)},
        ),
    ],
)
def test_the_authors_names_make_the_same_model(name, theirs, ours):
    images = torch.randn(1, 3, 64, 64)
    a, b = (timm.create_model(name, **TINY | kwargs).eval() for kwargs in (theirs, ours))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(images), b(images))


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("sret_t", {"depth": (4, 10, 6)}, "sret_t: the authors' argument `depth` is `depths` times `loops` here"),
        ("fan_tiny_12_p16_224", {"hybrid_backbone": {}}, "is `conv_dims` and the first two of `depths` here"),
        ("stvit_small", {"embed_dim": (8,) * 4, "dims": (8,) * 4}, "stvit_small: `dims` and `embed_dim` are one argument"),
        ("hvt_ti_1", {"pool_stride": 2}, "the authors' code always steps by 2"),
        ("sret_t", {"recursive_groop": 2}, "sret_t has no argument 'recursive_groop': did you mean 'recursive_groups'?"),
    ],
)
def test_an_argument_that_is_not_taken_is_answered(name, kwargs, said):
    with pytest.raises(TypeError) as raised:
        timm.create_model(name, **kwargs)
    assert said in str(raised.value)
