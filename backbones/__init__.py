"""The zoo's backbones. Importing this package registers every one of them with timm."""

import timm

import backbones.own_weights  # noqa: F401  (first: it names a file that stands in for ours)
from backbones import (  # noqa: F401
    cvt,
    fan,
    fcaformer,
    flatten,
    hvt,
    irpe,
    lit,
    litv2,
    monodepth,
    mvit,
    nat,
    pit,
    poolformer,
    registers,
    slab,
    sparsifiner,
    sret,
    stvit,
    swin,
)
from backbones.fuse import fuse, unfuse  # noqa: F401

__version__ = "0.1.0"  # of the whole zoo; pyproject.toml reads it here


def list_models(filter: str = "") -> list[str]:
    """Names of the zoo's models, sorted; `filter` with wildcards as in timm.list_models, e.g. "poolformer_*_gn"."""
    return [name for name in timm.list_models(filter) if timm.model_entrypoint(name).__module__.startswith("backbones.")]
