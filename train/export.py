"""Models for other programs: torch.export (.pt2), ONNX (.onnx) and weights alone (.safetensors).

A program is read back and compared with the model it came from, at sizes that its tracing has not seen, before its file gets
its name. What it needs besides the pixels (size, mean, std, class names, task) is in the file, under `KEY`.
"""

import contextlib
import copy
import importlib.util
import io
import json
import logging
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import backbones  # noqa: F401  (registers our models with timm)
from train.checks import nearest
from train.evaluation import open_run
from train.exported import EXTRA, KEY, OnnxModel
from train.output import check_writable
from train.plugins import is_model
from train.schema import Config
from train.show import Names

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ".safetensors"}
FREE = ("batch", "hw")


@dataclass
class Exported:
    """What `export` wrote.

    Attributes:
        file: the file.
        sizes: (batch, height, width) of the images on which it was compared with the model; empty for weights alone.
        programs: that ran it: torch, onnxruntime, openvino.
        worst: largest absolute difference from the model's output.
        relative: the same as a share of the output's largest number, or of 1 if that is smaller.
        least: smallest height and width that the program takes, None where the size is fixed.
    """

    file: Path
    sizes: list[tuple[int, int, int]] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)
    worst: float = 0.0
    relative: float = 0.0
    least: tuple[int, int] | None = None


def export(
    model: nn.Module,
    path: str | Path,
    size: tuple[int, int],
    in_chans: int = 3,
    to: str | None = None,
    dynamic: Collection[str] = ("batch",),
    opset: int | None = None,
    half: bool = False,
    about: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes `model` in evaluation mode; the file has its name only when it has been compared with the model.

    Raises ValueError for a format that there is not, for options that do not belong to it, for a model that cannot be exported
    so, and, with the difference, for a program that gives other numbers (more than 1e-3 of the largest, 2e-2 in half
    precision); FileExistsError for a file that is there; ImportError names the extra to install where ONNX is missing.

    Args:
        model: B C H W -> a tensor, or tensors by name.
        path: file to write.
        size: (H, W) of the images: the one size of the program, or where comparison starts if the size is free.
        in_chans: image channels.
        to: "onnx", "pt2" or "safetensors"; None: as the path ends.
        dynamic: what stays free: "batch", "hw" (height and width), both or neither.
        opset: of ONNX; None: torch's own.
        half: float16 weights, input and output.
        about: plain values for the metadata; `describe` makes them.
        overwrite: replace a file that is there.
    """
    path = Path(path)
    to = checked_target(path, to, dynamic, opset, overwrite)
    if "hw" in dynamic and (reason := next(filter(None, (getattr(part, "one_size", None) for part in model.modules())), None)):
        raise ValueError(f"not exported with free height and width: {reason}; leave hw out of --dynamic")
    model = model.eval().cpu().float()
    text = json.dumps({**(about or {}), "dynamic": sorted(dynamic), "half": half})
    draft = path.with_name(f".{path.stem}.draft{path.suffix}")  # of one folder with the file, so that a rename is enough
    try:
        done = Exported(path)
        if to == "safetensors":
            tensors = {name: value.half() if half and value.is_floating_point() else value for name, value in weights_of(model)}
            save_file(tensors, draft, {KEY: text, "names": json.dumps((about or {}).get("names", {}))})
        else:
            done = _program(model, draft, size, in_chans, to, dynamic, opset, half, text)
            done.file = path
        if draft.with_name(f"{draft.name}.data").exists():  # torch puts weights beyond 2 GB there
            raise ValueError(f"{path.name} would be larger than the 2 GB that an ONNX file holds: use --half or pt2")
        draft.replace(path)
    finally:
        for leftover in path.parent.glob(f"{draft.name}*"):
            leftover.unlink()
    return done


def export_source(
    source: str,
    path: str | Path,
    size: tuple[int, int] | None = None,
    pretrained: bool = False,
    to: str | None = None,
    dynamic: Collection[str] = ("batch",),
    opset: int | None = None,
    half: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Exports a run, or a model by name, and returns what was written as plain values (`zoo export`).

    Raises ValueError for a source that is neither, and what `export` raises.

    Args:
        source: run folder or model name.
        path: file to write.
        size: (H, W) of the images; None: the run's or the model's own.
        pretrained: released weights of a model by name.
        to: format; None: as the path ends.
        dynamic: what stays free, as in `export`.
        opset: of ONNX; None: torch's own.
        half: float16 weights, input and output.
        overwrite: replace a file that is there.
    """
    checked_target(Path(path), to, dynamic, opset, overwrite)
    model: Any
    if Path(source).is_dir():
        config, _, model, names = open_run(source)
    elif is_model(source):
        model = timm.create_model(source, pretrained=pretrained)
        config, names = describe_model(source, model)
        if not pretrained:
            logging.warning("the weights are random: --pretrained exports the released ones, a run folder its own")
    else:
        raise ValueError(f"{source!r} is neither a run folder nor a model; {nearest(source, timm.list_models())}")
    config.data.size = size or (config.data.size[0], config.data.size[1])
    about = describe(config, names)
    done = export(model, path, config.data.size, config.model.in_chans, to, dynamic, opset, half, about, overwrite)
    written: dict[str, Any] = {"file": str(done.file), "bytes": done.file.stat().st_size}
    if done.programs:
        written |= {"largest difference": done.worst, "compared in": done.programs, "at": done.sizes}
    return written | ({"smallest size": done.least} if done.least else {})


def checked_target(path: Path, to: str | None, dynamic: Collection[str], opset: int | None, overwrite: bool) -> str:
    """The format of a file that can be written, as everything that can be known before a model is made or opened.

    Raises what `checked_format` raises, FileExistsError for a file that is there, FileNotFoundError for a folder that is not,
    ValueError for one that cannot be written to, and ImportError where ONNX is missing.

    Args:
        path: file to write.
        to: format; None: as the path ends.
        dynamic: what stays free.
        opset: of ONNX.
        overwrite: replace a file that is there.
    """
    to = checked_format(path, to, dynamic, opset)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name, or replace it with --overwrite")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it, or choose another place for {path.name}")
    check_writable(path.parent, "place")
    if to == "onnx":
        require_onnx()
    return to


def checked_format(path: Path, to: str | None, dynamic: Collection[str], opset: int | None) -> str:
    """The format of a file, or a ValueError for one that there is not and for options that do not belong to it.

    Args:
        path: file to write.
        to: format; None: as the path ends.
        dynamic: what stays free.
        opset: of ONNX.
    """
    suffixes = {suffix: name for name, suffix in FORMATS.items()}
    if to is None and path.suffix not in suffixes:
        raise ValueError(f"export to {', '.join(suffixes)}, or say --to; got {path.name}")
    to = to or suffixes[path.suffix]
    if to not in FORMATS:
        raise ValueError(f"--to {to}: unknown format; {nearest(to, FORMATS)}")
    if path.suffix != FORMATS[to]:
        raise ValueError(f"--to {to} writes {FORMATS[to]} files, got {path.name}")
    for name in dynamic:
        if name not in FREE:
            raise ValueError(f"--dynamic {name}: batch, hw, or batch,hw")
    if opset is not None and to != "onnx":
        raise ValueError(f"--opset belongs to onnx, not to {to}")
    return to


def require_onnx() -> None:
    """ImportError with the line to type where a package is missing that ONNX export needs."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"ONNX export needs {package}: {EXTRA}")


def weights_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and tensors of a model, each with memory of its own, as safetensors wants them."""
    return [(name, value.detach().clone().contiguous()) for name, value in model.state_dict().items()]


def describe(config: Config, names: Names) -> dict[str, Any]:
    """What a program needs besides the pixels: plain values, which `zoo predict` reads back.

    Images are read as RGB of 0..255, resized to `size` (unless `eval_resize` says otherwise), divided by 255, then normalised
    with mean and std per channel.
    """
    data = config.data
    return {
        "task": config.task,
        "backbone": config.model.backbone,
        "in_chans": config.model.in_chans,
        "size": list(data.size),
        "eval_resize": data.eval_resize,
        "eval_crop": config.augment.eval_crop,
        "interpolation": config.augment.interpolation,
        "mean": list(data.mean or ()),
        "std": list(data.std or ()),
        "image_range": data.image_range,
        "infer": asdict(config.infer),
        "names": {"classes": names.classes, "palette": names.palette},
    }


def describe_model(name: str, model: Any) -> tuple[Config, Names]:
    """(configuration, class names) of a classifier by name, as its pretrained configuration has them."""
    cfg = model.pretrained_cfg
    config = Config(task={"name": "classification", "num_classes": model.num_classes})
    config.model.backbone, config.model.in_chans = name, cfg["input_size"][0]
    config.data.size = tuple(cfg["input_size"][1:])
    config.data.mean, config.data.std = tuple(cfg["mean"]), tuple(cfg["std"])
    config.augment.eval_crop = float(cfg.get("crop_pct") or 1.0)
    config.augment.interpolation = "bicubic" if cfg.get("interpolation") == "bicubic" else "bilinear"
    return config, Names()


def _program(
    model: nn.Module,
    path: Path,
    size: tuple[int, int],
    in_chans: int,
    to: str,
    dynamic: Collection[str],
    opset: int | None,
    half: bool,
    text: str,
) -> Exported:
    """Traces the model, writes the program and compares it at sizes that tracing has not seen (arguments as `export`)."""
    free = [axis for axis, name in ((0, "batch"), (2, "hw"), (3, "hw")) if name in dynamic]
    height, width = size
    # Odd and not square where the size is free: nothing may be taken for equal or divisible that only happens to be.
    traced = (2 * (height // 2) + 1, 2 * (width // 2) + 35) if "hw" in dynamic else size
    example = torch.randn(2 if "batch" in dynamic else 1, in_chans, *traced)
    kept = f"free {' and '.join(name for name in FREE if name in dynamic)}" if free else "one size"
    dtype = torch.float16 if half else torch.float32
    precise, model = model, (copy.deepcopy(model).half() if half else model)
    with torch.no_grad():
        shapes = (dict.fromkeys(free, torch.export.Dim.DYNAMIC),)
        try:
            program = torch.export.export(model, (example.to(dtype),), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # torch.export raises many kinds; all of them mean the same here
            reason = str(error).strip().splitlines()
            advice = "; leave hw out of --dynamic to export it for one size" if "hw" in dynamic else ""
            raise ValueError(f"{type(model).__name__} cannot be exported with {kept}: {reason[0]}{advice}") from error
        least = _least(program) if "hw" in dynamic else None
        runs: dict[str, Callable[[Tensor], list[Tensor]]]
        if to == "pt2":
            torch.export.save(program, path, extra_files={KEY: text})
            run = torch.export.load(path).module()
            runs = {"torch": lambda image: tensors_of(run(image))}
        else:
            outputs = names_of(model(example[:1].to(dtype)))
            _write_onnx(program, path, example.to(dtype), outputs, opset, text)
            session = OnnxModel(path)
            runs = {"onnxruntime": lambda image: tensors_of(session(image))}
            if importlib.util.find_spec("openvino") is not None and not half:
                runs["openvino"] = _openvino_runner(path)
        done = Exported(path, programs=list(runs), least=least)
        for batch, h, w in _unseen(size, dynamic, least):
            images = torch.randn(batch, in_chans, h, w)
            expected = tensors_of(precise(images))
            for name, run_it in runs.items():
                got = run_it(images.to(dtype))
                worst = max((a.float() - b).abs().max().item() for a, b in zip(got, expected, strict=True))
                scale = max(1.0, *(value.abs().max().item() for value in expected))
                if not worst <= (2e-2 if half else 1e-3) * scale:
                    raise ValueError(
                        f"the {to} program gives other numbers than the model in {name} on images of {h}x{w}: they differ by "
                        f"up to {worst:.3g}"
                    )
                done.worst, done.relative = max(done.worst, worst), max(done.relative, worst / scale)
            done.sizes.append((batch, h, w))
    return done


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a model's output: itself, or those of a dict or tuple, in order."""
    if isinstance(output, Tensor):
        return [output]
    values = list(output.values() if isinstance(output, dict) else output)
    if not all(isinstance(value, Tensor) for value in values):
        raise ValueError(f"a model with outputs of {type(values[0]).__name__} inside {type(output).__name__} is not exported")
    return values


def names_of(output: Any) -> list[str]:
    """What the outputs are called: "output", or the keys of a dict, or numbers."""
    tensors_of(output)
    if isinstance(output, Tensor):
        return ["output"]
    return list(output) if isinstance(output, dict) else [f"output_{i}" for i in range(len(output))]


def _least(program: torch.export.ExportedProgram) -> tuple[int, int]:
    """The smallest height and width that a program with free sizes takes."""
    (name,) = program.graph_signature.user_inputs
    node = next(node for node in program.graph.nodes if node.name == name)
    ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    height, width = (int(ranges[str(side)].lower) for side in node.meta["val"].shape[2:])
    return height, width


def _unseen(size: tuple[int, int], dynamic: Collection[str], least: tuple[int, int] | None) -> list[tuple[int, int, int]]:
    """(batch, height, width) of images that tracing has not seen, three of them not square where the size is free."""
    batch = 3 if "batch" in dynamic else 1
    if least is None:
        return [(batch, *size)]
    height, width = (max(side, bound) for side, bound in zip(size, least))
    return [
        (batch, height, width + 17),
        (1 if "batch" in dynamic else batch, height + 40, width),
        (batch, height + 9, width + 66),
    ]


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, example: Tensor, outputs: list[str], opset: int | None, text: str
) -> None:
    """Writes the ONNX file. Raises ValueError for an opset that torch does not write and for operators of torch alone."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # torch reports its progress there
        try:
            onnx = torch.onnx.export(
                program,
                (example,),
                dynamo=True,
                input_names=["image"],
                output_names=outputs,
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:  # of many kinds, as in torch.export
            opsets = "" if opset is None else f" at opset {opset}"
            raise ValueError(f"no ONNX of this model{opsets}: {str(error).strip().splitlines()[0]}") from error
    assert onnx is not None  # with dynamo it is a program
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in onnx.model.graph if node.domain} | _deformable(onnx))
    if foreign:
        raise ValueError(f"the ONNX program would need operators that others do not have: {', '.join(foreign)}")
    if opset is not None and onnx.model.opset_imports[""] != opset:
        raise ValueError(f"torch writes this model for opset {onnx.model.opset_imports['']}, not for {opset}")
    onnx.model.metadata_props[KEY] = text
    onnx.save(str(path))


def _deformable(onnx: Any) -> set[str]:
    """Standard operators that OpenVINO and TensorRT refuse."""
    return {node.op_type for node in onnx.model.graph if node.op_type == "DeformConv"}


def _openvino_runner(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Images -> outputs of an ONNX file in OpenVINO, computed in float32."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: [torch.from_numpy(value) for value in compiled([image.numpy()]).values()]
