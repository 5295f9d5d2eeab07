"""The `zoo` command. Each subcommand is a few lines that call functions which tests call too.

A mistake of the user ends with one sentence and exit code 2; --debug shows where it came from.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.bench import options
from train.checks import SIDE, RunError, nearest, within
from train.packages import shadowed

TRAIN_EXTRA = ("accelerate", "jsonargparse", "matplotlib", "rich", "sklearn", "tensorboard")  # what `[train]` installs
ERRORS = (ValueError, TypeError, OSError, ImportError, RunError)  # raised with a sentence for the user; others are our bugs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("backbones").setLevel(logging.INFO)  # says so when it compiles its kernel, half a minute of silence
    parser = build_parser()
    wrong = shadowed()
    if wrong:
        parser.exit(2, "\n".join(f"zoo: {sentence}" for sentence in wrong) + "\n")
    named = next((text for text in arguments if not text.startswith("-")), None)
    if named is not None and named not in parser.commands:
        parser.error(f"unknown command {named!r}; {nearest(named, parser.commands)}")
    args, rest = parser.parse_known_args(arguments)
    args.overrides = overrides(parser, rest, getattr(args, "takes_overrides", False))
    try:
        return args.run(args) or 0
    except BrokenPipeError:  # the reader, e.g. head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ERRORS as error:
        if args.debug:
            raise
        if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] in TRAIN_EXTRA:
            error = ImportError(f"needs {error.name}, which training brings: pip install 'backbone-zoo[train]'")
        where = f"[process {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"{where}zoo {args.command}: {sentence(error)}", file=sys.stderr)
        return 2


def sentence(error: BaseException) -> str:
    """The message of an error without the traceback that a loader worker puts around it."""
    text = str(error).strip() or type(error).__name__
    if text.startswith("Caught ") and "Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2] or text
    return text


def overrides(parser: argparse.ArgumentParser, rest: Sequence[str], allowed: bool) -> list[str]:
    """What the subcommand does not know: "--section.key=value" or "--section.key value". Anything else ends the program."""
    found: list[str] = []
    for text in rest:
        if text.startswith("--") and "." in text.partition("=")[0]:
            found.append(text)
        elif found and "=" not in found[-1]:
            found[-1] += f"={text}"
        else:
            parser.error(f"unknown argument {text!r}")
    if found and not allowed:
        parser.error(f"{found[0]!r}: this command takes no configuration keys")
    return found


class Parser(argparse.ArgumentParser):
    """An argument parser that knows the names of its commands."""

    commands: tuple[str, ...] = ()


def build_parser() -> Parser:
    """The parser of all subcommands."""
    parser = Parser(
        prog="zoo", description="Backbones, heads and training. `zoo COMMAND --help` says more.", allow_abbrev=False
    )
    parser.add_argument("--version", action=_Version, help="the zoo's version and those of torch and timm")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str, keys: bool = False, **options: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **options)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run, takes_overrides=keys)
        return sub

    sub = command("list", list_models, "Models, or configurations with --configs.")
    sub.add_argument("filter", nargs="?", default="", help="wildcards such as nat_*, or a part of the name")
    sub.add_argument("--license", help="only weights under this licence, e.g. mit")
    sub.add_argument("--pretrained", action="store_true", help="only models with released weights")
    sub.add_argument("--configs", action="store_true", help="shipped configurations instead")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("info", info, "What a model is: parameters, multiply-adds, feature maps, licence.")
    sub.add_argument("model", help="any model of the zoo or of timm")
    sub.add_argument("--size", nargs=2, type=SIDE, metavar=("H", "W"), help="image size; default: the model's own")
    sub.add_argument("--heads", action="store_true", help="also try a training step under every dense head (at 128 x 160)")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("train", train, "Train a configuration.", keys=True, formatter_class=_Help)
    sub.add_argument("config", help="shipped name (zoo list --configs) or path of a YAML file")
    sub.add_argument("--resume", action="store_true", help="go on from the newest intact checkpoint of run.dir")
    sub.add_argument("--accept-changes", action="store_true", help="resume although the configuration has changed")

    sub = command("eval", evaluate, "Evaluate a run's weights; overrides change the data.", keys=True)
    sub.add_argument("folder", metavar="RUN", help="run folder")
    sub.add_argument("--weights", default="model.safetensors", help="file in the run folder: model.safetensors (best) or last")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("predict", predict, "Predict a folder of images and videos with a run's weights.", keys=True)
    sub.add_argument("folder", metavar="RUN", help="run folder, or an .onnx file that zoo export wrote")
    sub.add_argument("images", help="folder of images and videos, or one of them")
    sub.add_argument("--out", required=True, help="folder for overlays and raw maps")
    sub.add_argument("--sheet", action="store_true", help="also each photograph beside its prediction")
    sub.add_argument("--overwrite", action="store_true", help="replace files that exist")
    sub.add_argument("--weights", default="model.safetensors", help="file in the run folder")

    sub = command("config", show_config, "Print a configuration, defaults filled in, or a new one for your data.", keys=True)
    sub.add_argument("config", help="shipped name or path; with --new the folder of your data")
    sub.add_argument(
        "--new",
        metavar="KIND",
        help="segmentation, depth or classification: look at the folder and write a configuration for it",
    )
    sub.add_argument("--json", action="store_true", help="as JSON")

    sub = command("data-check", data_check, "Read a configuration's data and report what is wrong with it.", keys=True)
    sub.add_argument("config", help="shipped name or path")
    sub.add_argument("--count", type=int, help="samples of each split to read; default: all")
    sub.add_argument("--out", help="folder for sample pictures")

    sub = command("convert", convert, "Rewrite a checkpoint under our names or the authors'.")
    sub.add_argument("model", help="model name")
    sub.add_argument("source", help="checkpoint in any known format")
    sub.add_argument("destination", help=".safetensors file to write")
    sub.add_argument("--naming", choices=("native", "official"), default="native")
    sub.add_argument("--which", help="of several weights in the file: a part of their place, e.g. student or model_ema")
    sub.add_argument("--args", default="{}", help="further arguments of the model as YAML, e.g. '{img_size: 384}'")

    sub = command("export", export, "Write a model as ONNX, torch.export or safetensors, and compare.")
    sub.add_argument("source", metavar="RUN_OR_MODEL", help="run folder or model name")
    sub.add_argument("destination", metavar="FILE", help="file ending in .onnx, .pt2 or .safetensors")
    sub.add_argument("--to", choices=("onnx", "pt2", "safetensors"), help="format; default: as the file ends")
    sub.add_argument("--size", nargs=2, type=SIDE, metavar=("H", "W"), help="image size; default: the run's or the model's own")
    sub.add_argument("--dynamic", default="batch", help="what stays free: batch, hw (height and width), batch,hw or none")
    sub.add_argument("--opset", type=int, help="of ONNX; default: torch's own")
    sub.add_argument("--half", action="store_true", help="float16 weights, input and output")
    sub.add_argument("--pretrained", action="store_true", help="released weights for a model by name; default: random ones")
    sub.add_argument("--overwrite", action="store_true", help="replace a file that exists")

    sub = command("push", push, "Put a run where others load it: the Hugging Face hub, or a folder.")
    sub.add_argument("folder", metavar="RUN", help="run folder")
    sub.add_argument("destination", help="user/name on the hub; or a folder, such as ./name")
    sub.add_argument("--license", help="of the weights, e.g. apache-2.0; the card says so if it is not stated")
    sub.add_argument("--private", action="store_true", help="a repository that only its owner sees")
    sub.add_argument("--overwrite", action="store_true", help="replace what is there")

    sub = command("analyze", analyze, "What a vision transformer attends to and how its layers differ: numbers and pictures.")
    sub.add_argument("model", help="model name, or run folder")
    sub.add_argument("images", nargs="+", help="images and folders of images")
    sub.add_argument(
        "--what", nargs="+", help="attention spectrum similarity dimension activations artefacts heads; default: all but heads"
    )
    sub.add_argument("--beside", nargs="+", default=[], metavar="MODEL", help="further models or runs, in the same pictures")
    sub.add_argument("--batch", type=within(int, 1), default=8, help="images at a time")
    analysis_options(sub)

    sub = command("explain", explain, "Where in an image a vision transformer finds a class, or what a pixel comes from.")
    sub.add_argument("model", help="model name, or run folder")
    sub.add_argument("images", nargs="+", help="images and folders of images")
    sub.add_argument("--class", dest="wanted", metavar="CLASS", help="id or name; default: the best class of each image")
    sub.add_argument("--pixel", nargs=2, type=within(int, 0), metavar=("ROW", "COLUMN"), help="of a dense run's output")
    sub.add_argument("--start", type=within(int, 0), default=0, help="first block that counts")
    analysis_options(sub)

    sub = command("look", look, "What a backbone sees: features of each stage, and what one place attends to, as a picture.")
    sub.add_argument("model", help="model name, or run folder")
    sub.add_argument("images", nargs="+", help="images and folders of images")
    sub.add_argument("--at", type=place, metavar="X,Y", help="the place, shares of width and height; default: the most salient")
    analysis_options(sub)

    sub = command("demo", demo, "A page in the browser: drop an image, see prediction, features and attention.")
    sub.add_argument("runs", nargs="*", metavar="RUN", help="run folders to offer; default: those below ./runs")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in")
    sub.add_argument("--port", type=within(int, 0, 65535), default=7860)

    options.add_to(command("bench", bench, "Measure speed.", formatter_class=argparse.RawDescriptionHelpFormatter))

    sub = command("plan", plan, "Memory, communication and storage that a configuration needs on N GPUs.", keys=True)
    sub.add_argument("config", help="shipped name or path")
    sub.add_argument("--gpus", type=int, default=8, help="of one node, one process each")
    sub.add_argument("--gpu", default="h100", help="a100, h100 or h200")
    sub.add_argument("--utilisation", type=float, default=0.4, help="share of the GPU's peak that training reaches")
    sub.add_argument("--image-kb", type=float, default=110.0, help="mean size of an image file; 110 is ImageNet's")
    sub.add_argument("--images", type=int, help="of an epoch, for its time")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("doctor", doctor, "What works on this machine, and why not.")
    sub.add_argument("model", nargs="?", help="a model to say it for")
    sub.add_argument("--size", nargs=2, type=SIDE, metavar=("H", "W"))
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("completion", completion, "Print a script that completes zoo's commands and options in your shell.")
    sub.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    parser.commands = tuple(commands.choices)
    return parser


def analysis_options(sub: argparse.ArgumentParser) -> None:
    """What analyze, explain and look share."""
    sub.add_argument("--out", required=True, help="folder for the results")
    sub.add_argument("--size", nargs=2, type=SIDE, metavar=("H", "W"), help="image size; default: the run's or the model's own")
    sub.add_argument("--checkpoint", help="weights for a model by name; default: its released ones")
    sub.add_argument("--which", help="of several weights in that file: a part of their place, e.g. student or model_ema")
    sub.add_argument("--untrained", action="store_true", help="random weights for a model by name")


def place(text: str) -> tuple[float, float]:
    """Two numbers with a comma between them, e.g. 0.4,0.6."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not x,y as shares of width and height, e.g. 0.4,0.6") from None
    return x, y


class _Version(argparse.Action):
    """Prints the versions and ends; they cost an import, so only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import timm
        import torch

        import backbones

        print(f"backbone-zoo {backbones.__version__} (torch {torch.__version__}, timm {timm.__version__})")
        parser.exit()


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the configuration keys, which cost an import, only when help is asked for."""

    def format_help(self) -> str:
        from train.config import keys_help

        return super().format_help() + "\n" + keys_help()


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same keys as a table; plain columns when the output is no terminal."""
    from rich.console import Console
    from rich.table import Table

    if not sys.stdout.isatty():
        widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
        for row in [{key: key for key in rows[0]}, *rows]:
            print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()).rstrip())
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(highlight=False).print(table)


def print_pairs(values: dict[str, Any]) -> None:
    """One "key: value" per line."""
    for key, value in values.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        print(f"{key}: {shown}")


# --------------------------------------------------------------------------------------------------------------- subcommands


def list_models(args: argparse.Namespace) -> int:
    from train import describe

    if args.configs:
        rows = describe.configurations(args.filter)
    else:
        rows = describe.models(args.filter, args.license, args.pretrained)
    if not rows:
        print(f"zoo list: {describe.nothing_found(args.filter, args.license, args.configs)}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(rows))
    else:
        print_table(rows)
    return 0


def info(args: argparse.Namespace) -> None:
    from train import describe

    size: dict[str, Any] = {"size": tuple(args.size)} if args.size else {}
    found = describe.info(args.model, **size)
    if not args.json:
        print_pairs(found)
    if args.heads:
        from heads import matrix

        results = matrix.row(args.model, **size)
        if args.json:
            found["heads"] = results
        else:
            print_pairs({f"under {head}": result for head, result in results.items()})
    if args.json:
        print(json.dumps(found))


def train(args: argparse.Namespace) -> None:
    from train import config, engine

    engine.fit(config.load(args.config, args.overrides), args.resume, args.accept_changes)


def evaluate(args: argparse.Namespace) -> None:
    from train.evaluation import evaluate_run

    metrics = evaluate_run(args.folder, args.overrides, args.weights)
    if int(os.environ.get("RANK", 0)) == 0:
        if args.json:
            print(json.dumps(metrics))
        else:
            print_pairs(metrics)


def predict(args: argparse.Namespace) -> int:
    from train.predict import predict

    done = predict(args.folder, args.images, args.out, args.overwrite, args.weights, args.overrides, sheet=args.sheet)
    for complaint in done.failed.values():
        print(f"zoo predict: skipped {complaint}", file=sys.stderr)
    return 2 if done.failed else 0


def show_config(args: argparse.Namespace) -> None:
    from train import config

    if args.new is not None:
        from train.new_config import new

        if args.overrides or args.json:
            raise ValueError("--new writes a file to edit: redirect it, and give keys and --json to that file")
        print(new(args.new, args.config, say=lambda text: print(text, file=sys.stderr)), end="")
        return
    loaded = config.load(args.config, args.overrides)
    print(json.dumps(config.as_dict(loaded), indent=1) + "\n" if args.json else config.as_yaml(loaded), end="")


def data_check(args: argparse.Namespace) -> int:
    from train import config
    from train.data.check import check

    loaded = config.load(args.config, args.overrides)
    return check(loaded.data, config.build_task(loaded), args.count, args.out, loaded.model.in_chans)


def convert(args: argparse.Namespace) -> None:
    import weights
    from train.output import check_writable
    from train.plugins import require_model
    from train.reading import parse

    destination = Path(args.destination)
    if destination.exists():
        raise FileExistsError(f"{destination} exists; choose another name or remove it")
    check_writable(destination.parent, "destination")
    model_args = parse(args.args, f"--args {args.args[:60]!r}")
    if not isinstance(model_args, dict):
        raise ValueError(f"--args must be a YAML mapping, got {args.args!r}")
    require_model("", args.model)
    print(weights.convert_file(args.model, args.source, args.destination, args.naming, args.which, **model_args))


def export(args: argparse.Namespace) -> None:
    from train.export import export_source

    dynamic = [] if args.dynamic == "none" else args.dynamic.split(",")
    options = (args.to, dynamic, args.opset, args.half, args.overwrite)
    done = export_source(args.source, args.destination, tuple(args.size) if args.size else None, args.pretrained, *options)
    print(json.dumps(done))


def push(args: argparse.Namespace) -> None:
    from train.push import push

    print(push(args.folder, args.destination, args.license, args.private, args.overwrite))


def analyze(args: argparse.Namespace) -> None:
    from train.analyze import DEFAULT, analyze

    sources, what = [args.model, *args.beside], args.what or DEFAULT
    analyze(sources, args.images, args.out, what, args.size, args.checkpoint, args.untrained, args.batch, args.which)


def explain(args: argparse.Namespace) -> None:
    from train.analyze import explain_images

    options = (args.wanted, args.pixel, args.start, args.size, args.checkpoint, args.untrained, args.which)
    explain_images(args.model, args.images, args.out, *options)


def look(args: argparse.Namespace) -> None:
    from train.look import look

    look(args.model, args.images, args.out, args.at, args.size, args.checkpoint, args.untrained, args.which)


def demo(args: argparse.Namespace) -> None:
    from train.demo import demo

    demo(args.runs, args.host, args.port)


def bench(args: argparse.Namespace) -> int:
    from train.bench.run import run

    return run(args)


def plan(args: argparse.Namespace) -> None:
    from train import config
    from train.plan import plan, shown

    loaded = config.load(args.config, args.overrides)
    found = plan(loaded, args.gpus, args.gpu, args.utilisation, args.image_kb, args.images)
    if args.json:
        print(json.dumps(found))
    else:
        print_pairs(shown(found))


def doctor(args: argparse.Namespace) -> None:
    from train import doctor

    size = tuple(args.size) if args.size else None
    if args.json:
        print(json.dumps(doctor.found(args.model, size)))
    else:
        doctor.run(args.model, size)


def completion(args: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as error:
        raise ImportError('shell completion needs shtab: pip install "backbone-zoo[complete]"') from error

    print(shtab.complete(build_parser(), args.shell))
