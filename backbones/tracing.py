"""Functions that torch.fx keeps whole, whoever traces: torch.fx itself, torchvision, timm.

A tracer runs a model with stand-ins for tensors, which have no sizes. What a map's size decides (padding, windows, resized
tables) therefore belongs into a function with this decorator. So does whatever is computed of parameters alone: a tracer
would keep the result as a constant, with the weights of that moment and on the traced model.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.fx import Proxy

Function = TypeVar("Function", bound=Callable[..., Any])


def leaf(function: Function) -> Function:
    """`function`, a module's own by name; called by a tracer, it becomes one node of the graph."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        proxy = _find_proxy((*args, *kwargs.values()))
        if proxy is not None:
            return proxy.tracer.create_proxy("call_function", call, args, kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def _find_proxy(values: tuple | list) -> Proxy | None:
    """A tracer's stand-in among the values, inside tuples and lists too."""
    for value in values:
        if isinstance(value, Proxy):
            return value
        if isinstance(value, (tuple, list)) and (found := _find_proxy(value)) is not None:
            return found
    return None
