"""The options of `zoo bench`. Nothing heavy is imported: every command of the program reads this file."""

import argparse

from train.bench import gpu
from train.checks import SIDE, within

HELP = """what is one or more models, run folders or exported files, measured beside each other; the first is compared with the
others, one alone with timm's swin_tiny_patch4_window7_224. Ways follow an "@": swin_t@fuse, nat_tiny@compile+tiled,
MODEL@openvino, RUN@int8 (linear layers quantised dynamically; the error beside it is that of these weights and noise images).
Or one of
  ops      neighbourhood attention: the backends beside each other
  heads    dense heads beside other libraries' on the same features; names after it choose some: heads mask2former kmax
  claims   what papers say of speed and cost (docs/benchmarks/claims.md)
  linear   linear layers with weights packed once, as `backbones.fuse` has them, beside plain ones
  edits    ViTs with merged tokens, pruned and with folded norms, beside the plain ones
  gpu      everything a GPU has to show in a few minutes, into one JSON file (--minutes, --out, --cifar, --rehearse, --parts)
  train    steps of `zoo train` beside timm's train.py (--script)
"""


def add_to(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `zoo bench`."""
    parser.epilog = HELP
    parser.add_argument("what", nargs="+", help="what to measure")
    parser.add_argument("--size", nargs=2, type=SIDE, metavar=("H", "W"), help="of the images or, for ops, of the only map")
    parser.add_argument(
        "--batches", nargs="+", type=within(int, 1), default=[1, 8], help="batch sizes, for models (1 is the latency)"
    )
    parser.add_argument("--rounds", type=within(int, 1), default=7, help="interleaved rounds that count")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument(
        "--threads", type=within(int, 1, 1024), default=1, help="of a CPU; one is timed by process time, more by the wall"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of weights and images in inference, of autocast in training",
    )
    parser.add_argument("--engine", choices=("eager", "compile", "onnxruntime", "openvino"), default="eager")
    parser.add_argument("--compile", action="store_true", help="the same as --engine compile")
    parser.add_argument("--fuse", action="store_true", help="fold every model for inference first")
    parser.add_argument("--channels-last", action="store_true", help="weights and images in that layout")
    parser.add_argument("--inference", action="store_true", help="leave out training steps")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory, which costs a process a number")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    gpu.add_to(parser)
    parser.add_argument("--script", help="for train: the path of timm's train.py")
