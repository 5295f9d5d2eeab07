"""Checkpoints: open them safely, find their format, convert, load strictly, report."""

from weights.convert import convert_state_dict

__all__ = ["convert_state_dict"]
