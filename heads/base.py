"""What a dense head is: feature maps in, one map or named outputs out, and scores that every evaluation can read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

# finest first: maps B C H W, or pairs (map, prefix tokens B P C) where a head asks for them
Maps = Sequence[Tensor | tuple[Tensor, Tensor]]
Output = Tensor | Mapping[str, Any]


class Head(nn.Module):
    """A head on feature maps: a subclass, a row in `heads.HEADS`, and it serves every backbone and task.

    A subclass takes `(channels, out_channels, its own typed arguments)` and knows nothing else of what it is put on: channels
    of each map, finest first; out_channels: classes, or what the depth rule reads. Sizes come from the tensors it is given.

    Attributes that say how it is plugged in; a class sets them, or a constructor where an argument decides:
        family: which converter of weights/convert reads its published files.
        pyramid: it reads maps of falling sizes, so maps of one size (plain ViTs) are made a pyramid first.
        takes_one_scale: the constructor has an argument `one_scale`, and is told whether all maps have one size.
        takes_prefix_counts: the constructor has an argument `prefix_counts`, and is told how many prefix tokens (class token,
            registers) stand beside each map.
        prefix_tokens: it reads pairs (map, prefix tokens) instead of maps.
        returns_names: `forward` returns a dict instead of one map.
        returns_layers: that dict is {"map": B K h w, "layers": [the same of earlier layers, trained with the same loss]}.
        only_channels: the one value of out_channels it has a meaning for (a head that gives metres: 1), or None for any.
    """

    family: str = "heads"
    pyramid: bool = False
    takes_one_scale: bool = False
    takes_prefix_counts: bool = False
    prefix_tokens: bool = False
    returns_names: bool = False
    returns_layers: bool = False
    only_channels: int | None = None

    forward: Callable[..., Output]
    """Maps, finest first -> B K h w of any size; or a dict with what the losses of its task need: class and mask logits,
    outputs of auxiliary layers in lists, disparities at several sizes. Values are tensors, or lists and dicts of tensors. The
    predictor adds "size": (H, W) of the padded images, which the maps cover."""

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The layer, or all the layers, whose number of outputs is the number of classes."""
        raise NotImplementedError(f"{type(self).__name__} does not say which layer depends on out_channels: get_classifier()")

    def scores(self, output: Any) -> Tensor:
        """What `forward` returned -> B K h w, the one map that evaluation, windows and prediction read.

        A head of named outputs defines it: class scores from queries and masks, the finest disparity, the semantic map. Where
        resizing the result is not the published rule, it resizes its maps to `output["size"]` first.
        """
        if not isinstance(output, Tensor):
            raise NotImplementedError(f"{type(self).__name__} returns {', '.join(output)}: scores() must make B K h w of them")
        return output


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a head's output, however they are nested."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, (list, tuple)):
        return []
    return [tensor for part in output for tensor in tensors(part)]
