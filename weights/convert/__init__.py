"""Foreign state dicts -> ours, and back; one module per family, named by the model's attribute `family`."""

import importlib
from types import ModuleType

from torch import Tensor, nn

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")  # an average is preferred to the raw weights


def convert_state_dict(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's content in any known format -> the names and shapes of `model`. Native names pass unchanged."""
    for name in WRAPPERS:
        if isinstance(state_dict.get(name), dict):
            return convert_state_dict(state_dict[name], model)
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    return converter(model).to_native(state_dict, model)


def converter(model: nn.Module) -> ModuleType:
    """The module of weights/convert that knows the formats of the model's family."""
    return importlib.import_module(f"weights.convert.{model.family}")
