"""pytest plugin (-p timm_names) that points timm's own tests/test_models.py at our models.

The names come from timm.list_models, which the test file calls when it is imported; here it lists ours alone.
"""

import fnmatch

import families
import timm
import timm.models
from timm.models import _registry

import backbones

OURS = set(backbones.list_models())
# timm's file separates, by name, the models that give tokens (B N C) from those that give maps; these of ours give tokens.
TOKENS = families.every("tokens")
NO_MAPS = [name for name in OURS if not timm.create_model(name, device="meta").feature_info]
_list_models = _registry.list_models


def _ours(filter="", module="", exclude_filters="", include_tags=None, name_matches_cfg=False, **kwargs) -> list[str]:
    exclude = [exclude_filters] if isinstance(exclude_filters, str) else list(exclude_filters)
    wanted = [filter] if isinstance(filter, str) else list(filter)
    if "poolformer_*" in exclude:
        exclude += TOKENS
    if "poolformer_*" in wanted:
        wanted += TOKENS
    if module:  # timm's list of architectures whose intermediate maps it tests
        exclude += NO_MAPS
    names = _list_models(include_tags=include_tags, **kwargs)
    names = [name for name in names if name.split(".")[0] in OURS]
    names = [name for name in names if not any(w and fnmatch.fnmatch(name, w) for w in exclude)]
    return [name for name in names if not any(wanted) or any(fnmatch.fnmatch(name, w) for w in wanted)]


timm.list_models = timm.models.list_models = _ours
timm.list_pretrained = lambda *args, **kwargs: []
