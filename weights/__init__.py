"""Checkpoints: open them safely, find their format, convert, load strictly, report."""

from weights.fetch import fetch, overlay
from weights.load import Report, complete_state_dict, convert_file, convert_state_dict, load_checkpoint
from weights.read import open_checkpoint, safe_reading

__all__ = [
    "Report",
    "complete_state_dict",
    "convert_file",
    "convert_state_dict",
    "fetch",
    "load_checkpoint",
    "open_checkpoint",
    "overlay",
    "safe_reading",
]
