"""Models for other programs: torch.export (.pt2) and ONNX (.onnx), each compared with the model it came from."""

import contextlib
import io
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

FORMATS = {".onnx": "ONNX", ".pt2": "torch.export"}


def export(model: nn.Module, path: str | Path, size: tuple[int, int], in_chans: int = 3, tolerance: float = 1e-3) -> float:
    """Writes a model for images of `size` and any batch.

    The file is read back and run on random images. Returns the largest absolute difference from the model's own output.
    Raises ValueError for another suffix, for a model that cannot be exported, and, with the difference, if it exceeds the
    tolerance; ImportError names the extra to install where ONNX is missing.

    Args:
        model: in evaluation mode.
        path: of the file; its suffix chooses the format (.onnx, .pt2).
        size: (H, W) of the images.
        in_chans: their channels.
        tolerance: largest difference allowed, as a share of the largest output.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"export to .onnx or .pt2, got {path.name}")
    model = model.eval().cpu().float()
    batch = torch.export.Dim("batch", min=1, max=1024)
    example, probe = torch.randn(2, in_chans, *size), torch.randn(3, in_chans, *size)
    with torch.no_grad():
        expected = model(probe)
        try:
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)
        except Exception as error:  # torch.export raises many kinds; all of them mean the same here
            raise ValueError(f"{type(model).__name__} cannot be exported: {str(error).strip().splitlines()[0]}") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt2":
            torch.export.save(program, path)
            got = torch.export.load(path).module()(probe)
        else:
            got = _onnx(program, path, example, probe, batch)
    worst = (got - expected).abs().max().item()
    if not worst <= tolerance * max(1.0, expected.abs().max().item()):
        raise ValueError(f"{path} gives other numbers than the model: they differ by up to {worst:.3g}")
    return worst


def _onnx(program: torch.export.ExportedProgram, path: Path, example: Tensor, probe: Tensor, batch: torch.export.Dim) -> Tensor:
    """Writes the ONNX file and runs it on the probe with onnxruntime."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it and says so less clearly)
    except ImportError as error:
        raise ImportError('ONNX export needs three more packages: pip install "backbone-zoo[export]"') from error
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # torch reports its progress there
        onnx = torch.onnx.export(
            program, (example,), dynamo=True, input_names=["image"], output_names=["output"], verbose=False
        )
    assert onnx is not None  # with dynamo it is a program
    onnx.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: probe.numpy()})[0])
