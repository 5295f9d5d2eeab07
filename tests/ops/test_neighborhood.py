"""Neighbourhood attention: every backend that can run here against the authors' kernels and against the definition."""

import functools
import hashlib
import itertools
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading

import golden
import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

from backbones.ops import neighborhood
from backbones.ops.neighborhood import cpp_backend, neighborhood_attention, tiled

COMPILED = pytest.mark.skipif(cpp_backend.unavailable() is not None, reason=str(cpp_backend.unavailable()))
HERE = [pytest.param("cpp", marks=COMPILED), "tiled", "reference"]
FAST = HERE[:2]


def inputs(shape, kernel, dtype=torch.float32, bias=True, seed=0):
    """q, k, v as strided views of one qkv tensor, as a model has them, and a bias table; all require gradients."""
    generator = torch.Generator().manual_seed(seed)
    batch, height, width, heads, dim = shape
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    qkv = torch.randn(batch, height, width, 3, heads, dim, generator=generator).to(dtype).requires_grad_()
    table = torch.randn(heads, 2 * kh - 1, 2 * kw - 1, generator=generator).to(dtype).requires_grad_() if bias else None
    return qkv, table, torch.randn(shape, generator=generator).to(dtype)


def results(backend, shape, kernel, dilation, dtype=torch.float32, bias=True):
    """Output and gradients of qkv and bias, as float32."""
    qkv, table, grad = inputs(shape, kernel, dtype, bias)
    out = neighborhood_attention(*qkv.unbind(3), kernel, dilation, table, backend=backend)
    assert out.shape == tuple(shape) and out.dtype == dtype
    out.backward(grad)
    return [t.detach().float() for t in (out, qkv.grad, *([table.grad] if bias else []))]


def agree(backend, shape, kernel, dilation, bias=True):
    """The backend against the definition in float64."""
    expected = results("reference", shape, kernel, dilation, torch.float64, bias)
    for seen, wanted in zip(results(backend, shape, kernel, dilation, bias=bias), expected, strict=True):
        torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=2e-5)  # bias gradients are sums over all queries


@pytest.mark.parametrize("case", golden.cases("na2d_op_"))
@pytest.mark.parametrize("backend", HERE)
def test_outputs_and_gradients_match_the_authors_kernels(case, backend):
    info, tensors = golden.load(case)
    limits = info["suggested_tolerance"]
    for name, setting in info["cases"].items():

        def stored(key, name=name):
            tensor = tensors[f"{name}/{key}"]
            return tensor.permute(0, 2, 3, 1, 4) if tensor.dim() == 5 else tensor

        leaves = {key: stored(key).clone().requires_grad_() for key in ("q", "k", "v", *(["rpb"] if setting["rpb"] else []))}
        q, k, v, bias = (leaves.get(key) for key in ("q", "k", "v", "rpb"))
        out = neighborhood_attention(q, k, v, setting["kernel_size"], setting["dilation"], bias, setting["scale"], backend)
        torch.testing.assert_close(out, stored("out"), **limits["out"], msg=lambda m, name=name: f"{name} out: {m}")
        out.backward(stored("dout"))
        for key, leaf in leaves.items():
            wanted = stored(f"d{key}")
            torch.testing.assert_close(leaf.grad, wanted, **limits["gradients"], msg=lambda m, at=(name, key): f"{at}: {m}")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("shape", "kernel", "dilation"),
    [
        ((1, 3, 3, 1, 4), 3, 1),  # the map is the kernel
        ((2, 7, 7, 2, 8), 7, 1),
        ((1, 21, 14, 1, 8), 7, 2),  # rows larger than kernel x dilation, columns equal
        ((1, 48, 61, 1, 4), 3, 16),  # the widest dilation: 256 groups of 3 or 4 positions a side
        ((1, 5, 37, 2, 5), (3, 5), (1, 7)),  # nothing square, head dim odd, ragged groups
        ((2, 31, 8, 1, 40), (5, 3), (4, 2)),
        ((1, 29, 33, 2, 32), 7, 1),  # several tiles and blocks on both axes
        ((1, 17, 20, 3, 24), 7, (2, 1)),
        ((1, 30, 19, 1, 16), (13, 3), 1),
        ((1, 15, 34, 1, 48), (3, 13), (1, 2)),
        ((1, 26, 27, 1, 128), 11, 1),
        ((3, 19, 18, 1, 33), (9, 9), (2, 2)),
        ((1, 6, 19, 2, 8), (1, 5), 1),  # rows that share no keys
        ((1, 4, 6, 1, 1), 1, 1),  # a kernel of 1 returns v
    ],
)
def test_every_shape_agrees_with_the_definition(backend, shape, kernel, dilation):
    agree(backend, shape, kernel, dilation)


@pytest.mark.parametrize("backend", FAST)
def test_no_bias_is_a_bias_of_zero(backend):
    agree(backend, (1, 18, 15, 2, 16), 5, 2, bias=False)
    qkv, table, _ = inputs((1, 18, 15, 2, 16), 5)
    with_zeros = neighborhood_attention(*qkv.unbind(3), 5, 2, table * 0, backend=backend)
    torch.testing.assert_close(neighborhood_attention(*qkv.unbind(3), 5, 2, backend=backend), with_zeros)


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_is_within_its_rounding(backend):
    shape, kernel, dilation = (1, 17, 16, 2, 32), 7, 2
    for seen, wanted in zip(
        results(backend, shape, kernel, dilation, torch.bfloat16), results("reference", shape, kernel, dilation), strict=True
    ):
        # inputs rounded to 8 bits: 1e-2 of the largest value seen (SDPA also rounds its probabilities)
        torch.testing.assert_close(seen, wanted, rtol=0.0, atol=3e-2 * wanted.abs().max().item())


@COMPILED
def test_bfloat16_inputs_of_the_kernel_are_computed_in_float32():
    qkv, table, _ = inputs((1, 12, 13, 2, 32), 7, torch.bfloat16)
    exact = neighborhood_attention(*qkv.float().unbind(3), 7, 1, table.float(), backend="cpp")
    rounded = neighborhood_attention(*qkv.unbind(3), 7, 1, table.float(), backend="cpp")
    assert torch.equal(rounded, exact.bfloat16())


def test_the_definition_passes_gradcheck():
    qkv, table, _ = inputs((1, 5, 6, 2, 3), 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, b: neighborhood_attention(*x.unbind(3), 3, (1, 2), b, backend="reference"), (qkv, table)
    )


def test_queries_see_the_keys_of_the_definition():
    # one axis, kernel 3, dilation 2, seven positions: groups 0 2 4 6 and 1 3 5; the window slides inwards at the borders
    keys, entries = neighborhood.reference.neighbours(7, 3, 2)
    assert keys.tolist() == [[0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5], [2, 4, 6], [1, 3, 5], [2, 4, 6]]
    assert entries.tolist() == [[2, 3, 4], [2, 3, 4], [1, 2, 3], [1, 2, 3], [1, 2, 3], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("backend", HERE)
def test_batches_of_none_and_one(backend):
    qkv, table, _ = inputs((3, 9, 16, 2, 8), 3)
    whole = neighborhood_attention(*qkv.unbind(3), 3, 1, table, backend=backend)
    one = neighborhood_attention(*qkv[1:2].unbind(3), 3, 1, table, backend=backend)
    torch.testing.assert_close(one, whole[1:2], rtol=0.0, atol=1e-6)
    none = neighborhood_attention(*qkv[:0].unbind(3), 3, 1, table, backend=backend)
    assert none.shape == (0, 9, 16, 2, 8)
    none.sum().backward()
    assert table.grad is not None and not table.grad.any()


@pytest.mark.parametrize("backend", HERE)
def test_any_strides_give_the_same(backend):
    qkv, table, grad = inputs((2, 9, 11, 2, 8), 3)
    q, k, v = (t.detach().contiguous() for t in qkv.unbind(3))
    expected = neighborhood_attention(q, k, v, 3, 2, table, backend=backend)
    heads_first = [t.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4) for t in (q, k, v)]
    dims_apart = [torch.stack((t, t), -1)[..., 0] for t in (q, k, v)]
    flipped = [t.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0) for t in (q, k, v)]
    for variant in (heads_first, dims_apart, flipped):
        assert not any(t.is_contiguous() for t in variant)
        leaves = [t.detach().requires_grad_() for t in variant]
        out = neighborhood_attention(*leaves, 3, 2, table, backend=backend)
        torch.testing.assert_close(out, expected, rtol=0.0, atol=1e-6)
        # a gradient that is an expanded scalar has no strides at all
        out.sum().backward()
        torch.testing.assert_close(leaves[2].grad.sum(), torch.tensor(float(out.numel())))


@pytest.mark.parametrize("backend", HERE)
def test_uninitialised_memory_never_shows(backend):
    # fresh memory holds NaN when torch fills it: an output or workspace that is not written in full would show
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        for shape, kernel, dilation in (((1, 17, 9, 2, 20), 3, 3), ((1, 16, 20, 1, 32), 7, 1)):
            for tensor in results(backend, shape, kernel, dilation):
                assert tensor.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@COMPILED
def test_threads_change_nothing():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results("cpp", (1, 41, 30, 3, 16), 5, 1)
        torch.set_num_threads(3)
        for seen, wanted in zip(results("cpp", (1, 41, 30, 3, 16), 5, 1), alone, strict=True):
            assert torch.equal(seen, wanted)
    finally:
        torch.set_num_threads(threads)


@COMPILED
@pytest.mark.parametrize("bias", [True, False])
def test_the_compiled_operators_pass_opcheck(bias):
    qkv, table, grad = inputs((2, 7, 8, 2, 4), 3, bias=bias)
    arguments = (*qkv.unbind(3), table, [3, 3], [2, 1], 0.5)
    torch.library.opcheck(torch.ops.backbones.neighborhood_cpu, arguments)
    with torch.no_grad():
        stats = torch.ops.backbones.neighborhood_cpu(*arguments)[1]
        torch.library.opcheck(torch.ops.backbones.neighborhood_cpu_backward, (grad, *arguments[:4], stats, *arguments[4:]))


@COMPILED
def test_the_compiled_operator_refuses_a_second_derivative():
    qkv, table, _ = inputs((1, 5, 5, 1, 4), 3)
    out = neighborhood_attention(*qkv.unbind(3), 3, bias=table, backend="cpp")
    with pytest.raises(RuntimeError, match="no second derivative: use backend='reference'"):
        torch.autograd.grad(out.sum(), qkv, create_graph=True)


@pytest.mark.parametrize("backend", FAST)
def test_activation_checkpointing_and_compilation_change_nothing(backend):
    qkv, table, grad = inputs((1, 16, 9, 1, 8), 3)

    def attend(x, b):
        return neighborhood_attention(*x.unbind(3), 3, 2, b, backend=backend)

    expected = attend(qkv, table)
    wanted = torch.autograd.grad(expected, (qkv, table), grad)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for out in (checkpoint(attend, qkv, table, use_reentrant=False), compiled(qkv, table)):
        torch.testing.assert_close(out, expected, rtol=0.0, atol=2e-6)  # SDPA without gradients is another kernel
        for seen, true in zip(torch.autograd.grad(out, (qkv, table), grad), wanted, strict=True):
            torch.testing.assert_close(seen, true, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_the_tiled_operator_passes_torch_checks(bias):
    """Its backward too: the checks compile a forward and backward with open sizes."""
    qkv, table, _ = inputs((2, 17, 9, 1, 4), 3, bias=bias)
    tiled._register_operator()
    arguments = (*[part.detach().requires_grad_() for part in qkv.unbind(3)], table, [3, 3], [2, 1], 0.5)
    torch.library.opcheck(torch.ops.backbones.neighborhood_tiled, arguments)


@pytest.mark.parametrize("backend", FAST)
def test_one_graph_serves_every_size_of_the_map(backend):
    """Sizes that stay open: nothing in the graph is a copy of one map's cut."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    def attend(x, b):
        return neighborhood_attention(*x.unbind(3), 3, 2, b, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=keep, fullgraph=True)
    for size in ((16, 9), (31, 20), (7, 40)):
        qkv, table, _ = inputs((2, *size, 1, 8), 3)
        qkv = qkv.detach()
        for axis in (0, 1, 2):
            torch._dynamo.mark_dynamic(qkv, axis)
        torch.testing.assert_close(compiled(qkv, table), attend(qkv, table), rtol=0.0, atol=2e-6)
    assert len(graphs) == 1 and len(graphs[0].graph.nodes) < 40


def test_automatic_choice_compiles_without_a_break():
    qkv, table, _ = inputs((2, 9, 9, 1, 8), 3)
    compiled = torch.compile(lambda x, b: neighborhood_attention(*x.unbind(3), 3, 1, b), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(qkv, table), neighborhood_attention(*qkv.unbind(3), 3, 1, table), rtol=0.0, atol=1e-6)


class Attention(torch.nn.Module):
    def __init__(self, kernel, dilation):
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.bias = torch.nn.Parameter(torch.randn(2, 2 * kernel - 1, 2 * kernel - 1))

    def forward(self, qkv):
        return neighborhood_attention(*qkv.unbind(3), self.kernel, self.dilation, self.bias)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("kernel", "dilation", "size"), [(3, 2, (20, 17)), (7, 1, (9, 24))])
def test_an_exported_program_has_standard_operators_and_any_batch(strict, kernel, dilation, size):
    model, qkv = Attention(kernel, dilation).eval(), torch.randn(2, *size, 3, 2, 8)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (qkv,), dynamic_shapes=shapes, strict=strict)
    used = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {getattr(target, "namespace", "aten") for target in used} == {"aten"}
    other = torch.randn(5, *size, 3, 2, 8)
    torch.testing.assert_close(program.module()(other), model(other), rtol=0.0, atol=1e-5)


def test_onnx_runs_the_same(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is checked with onnxruntime, which is not installed")
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript, which is not installed")
    model, qkv = Attention(3, 2).eval(), torch.randn(2, 16, 17, 3, 2, 8)
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (qkv,), tmp_path / "na.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "na.onnx", providers=["CPUExecutionProvider"])
    other = torch.randn(3, 16, 17, 3, 2, 8)
    (seen,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    torch.testing.assert_close(torch.from_numpy(seen), model(other), rtol=0.0, atol=1e-5)


def test_meta_tensors_and_fake_tensors_have_shapes():
    model = Attention(5, 2)
    assert model.to("meta")(torch.empty(2, 21, 30, 3, 2, 8, device="meta")).shape == (2, 21, 30, 2, 8)
    with torch._subclasses.FakeTensorMode():
        assert Attention(5, 2)(torch.empty(2, 21, 30, 3, 2, 8)).shape == (2, 21, 30, 2, 8)
    real = Attention(5, 2)  # nothing fake may stay behind
    assert real(torch.randn(2, 21, 30, 3, 2, 8)).isfinite().all()


@pytest.mark.parametrize("backend", HERE)
def test_training_works_after_inference_mode(backend):
    model, qkv = Attention(5, 1), torch.randn(1, 23, 22, 3, 2, 8)
    with torch.inference_mode():
        neighborhood_attention(*qkv.unbind(3), 5, 1, model.bias, backend=backend)
    neighborhood_attention(*qkv.unbind(3), 5, 1, model.bias, backend=backend).sum().backward()
    assert model.bias.grad.isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_autocast_with_a_float32_bias(backend):
    model = Attention(3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        qkv = torch.nn.functional.linear(torch.randn(1, 9, 16, 3, 2, 8), torch.eye(8))
        out = neighborhood_attention(*qkv.unbind(3), 3, 1, model.bias, backend=backend)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert model.bias.grad.dtype == torch.float32 and model.bias.grad.isfinite().all()


def test_tiles_never_hold_a_square_of_the_map():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    qkv, table, _ = inputs((1, 96, 96, 1, 8), 7)
    with Watch():
        neighborhood_attention(*qkv.unbind(3), 7, 1, table, backend="tiled").sum().backward()
    # the score of a query is against a window of 14 x 14 keys, not 9216
    assert largest <= 9216 * 14 * 14


def test_tiles_gathered_in_several_passes_agree_with_the_definition(monkeypatch):
    monkeypatch.setattr(tiled, "CHUNK_BYTES", 1)  # a row of tiles per pass
    agree("tiled", (2, 29, 33, 2, 8), 7, (1, 2))


def test_every_tile_of_every_cut_is_a_partition():
    for length, kernel, dilation in itertools.product((3, 14, 15, 29, 33, 64), (3, 7, 13), (1, 2, 4)):
        if length < kernel * dilation:
            continue
        axis = tiled._cut_axis(length, kernel, dilation)
        assert len(axis.queries) == axis.tiles * axis.tile and len(axis.keys) == axis.tiles * axis.window
        assert [axis.queries[place] for place in axis.outputs] == list(range(length))
        assert len(axis.pattern) == axis.tiles and axis.window <= axis.tile + kernel - 1


# Choice, refusals, errors


def test_a_map_smaller_than_the_window_is_refused_with_what_to_do():
    x = torch.randn(1, 13, 14, 1, 4)
    with pytest.raises(
        ValueError, match=r"H = 13 is smaller than kernel_size \* dilation = 7 \* 2 = 14: pad the map to at least 14"
    ):
        neighborhood_attention(x, x, x, 7, 2)
    with pytest.raises(ValueError, match="W = 14 is smaller .* = 15"):
        neighborhood_attention(x, x, x, (3, 5), (1, 3))
    assert neighborhood_attention(x, x, x, 7, (1, 2)).shape == x.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel_size": 4}, ValueError, "kernel_size must be odd"),
        ({"kernel_size": -3}, ValueError, "kernel_size must be at least 1"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size must be an int or a pair of ints"),
        ({"kernel_size": (3, 3, 3)}, TypeError, "kernel_size must be an int or a pair of ints"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1"),
        ({"q": torch.zeros(9, 9, 2, 4)}, ValueError, "q must be .B, H, W, heads, dim., got 4 dimensions"),
        ({"k": torch.zeros(1, 9, 8, 2, 4)}, ValueError, "k must have q's shape"),
        ({"v": torch.zeros(1, 9, 9, 2, 4).half()}, TypeError, "v must be torch.float32 on cpu like q, got torch.float16"),
        (
            {"bias": torch.zeros(2, 3, 3)},
            ValueError,
            r"bias must be \[heads, 2 kh - 1, 2 kw - 1\] = \(2, 5, 5\), got \(2, 3, 3\)",
        ),
        ({"bias": torch.zeros(2, 5, 5, dtype=torch.int64)}, TypeError, "bias must be floating point"),
        ({"backend": "tield"}, ValueError, "unknown neighbourhood attention backend 'tield'; did you mean 'tiled'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    x = torch.zeros(1, 9, 9, 2, 4)
    with pytest.raises(error, match=message):
        neighborhood_attention(**{"q": x, "k": x, "v": x, "kernel_size": 3, **change})


def test_integers_are_not_attended_to():
    x = torch.zeros(1, 9, 9, 2, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match="floating point"):
        neighborhood_attention(x, x, x, 3)


def test_a_backend_asked_for_by_name_does_not_fall_back():
    x = torch.zeros(1, 17, 17, 1, 4)
    with pytest.raises(ValueError, match="'cpp' cannot run this call: .* kernels up to 15"):
        neighborhood_attention(x, x, x, 17, backend="cpp")
    with pytest.raises(ValueError, match="'cpp' cannot run this call: .* not torch.float64"):
        neighborhood_attention(x.double(), x.double(), x.double(), 3, backend="cpp")
    agree("tiled", (1, 17, 17, 1, 4), 17, 1)
    assert neighborhood_attention(x, x, x, 17).shape == x.shape  # without a name another one runs


def test_the_first_that_does_not_refuse_is_chosen(monkeypatch):
    x = torch.zeros(1, 9, 9, 1, 4)
    call = neighborhood.check(x, x, x, 3)
    asked = []
    monkeypatch.setattr(cpp_backend, "refuses_now", lambda call: asked.append("cpp") or "not today")
    assert neighborhood.choose(call) == "tiled" and asked == ["cpp"]
    monkeypatch.setattr(cpp_backend, "refuses_now", lambda call: None)
    assert neighborhood.choose(call) == "cpp"
    assert neighborhood.choose(neighborhood.check(*[x.to("meta")] * 3, 3)) == "tiled"


def test_explain_has_an_answer_for_every_backend():
    x = torch.zeros(1, 9, 9, 1, 4)
    answers = neighborhood.explain(x, x, x, 3)
    assert list(answers) == list(neighborhood.BACKENDS)
    assert answers["tiled"] is None and answers["reference"] is None
    for answer in neighborhood.explain(*[x.double()] * 3, 3).values():
        assert answer is None or len(answer.split()) > 3


# The compiled library as a file


def python(code, **environment):
    """A process of its own, so that nothing is loaded yet."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in environment.items()}}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_without_a_compiler_there_is_one_log_line_and_the_tiled_path(tmp_path):
    out, log = python(
        """
        import logging, torch
        from backbones.ops.neighborhood import check, choose, neighborhood_attention
        logging.basicConfig()
        x = torch.randn(1, 9, 9, 1, 4)
        for _ in range(3):
            neighborhood_attention(x, x, x, 3)
        print(choose(check(x, x, x, 3)))
        try:
            neighborhood_attention(x, x, x, 3, backend="cpp")
        except ValueError as error:
            print(error)
        """,
        CXX=tmp_path / "no-compiler-here",
        TORCH_EXTENSIONS_DIR=tmp_path,
    )
    assert log.count("runs without its C++ kernel") == 1, log
    chosen, refusal = out.strip().splitlines()
    assert chosen == "tiled" and "could not be built" in refusal
    assert not list(tmp_path.glob("*.so")) and not [path for path in tmp_path.iterdir() if path.is_dir()]


ATTEND = """
    import logging, torch
    from backbones.ops.neighborhood import check, choose, cpp_backend, neighborhood_attention
    logging.basicConfig()
    cpp_backend.unavailable()  # without it the compiler would work in the background
    x = torch.ones(1, 9, 9, 1, 4)
    assert torch.equal(neighborhood_attention(x, x, x, 3), x)
    print(choose(check(x, x, x, 3)))
"""


@COMPILED
@pytest.mark.parametrize("damage", ["none", "cut", "one byte", "garbage", "a folder", "cache is a file"])
def test_a_damaged_library_is_compiled_again_or_left_with_a_sentence(damage, tmp_path):
    """No compiler here, so that a second compilation is seen: it fails, and the tiled path runs."""
    built = cpp_backend.library()
    path, cache = tmp_path / built.name, tmp_path
    content = bytearray(built.read_bytes())
    path.with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "one byte":
        content[len(content) // 2] ^= 1
    elif damage == "garbage":
        content = bytearray(b"no library")
        path.with_suffix(".sha256").unlink()
    if damage == "a folder":
        path.mkdir()
    else:
        path.write_bytes(content)
    if damage == "cache is a file":
        cache = path
    out, log = python(ATTEND, CXX=tmp_path / "no-compiler-here", TORCH_EXTENSIONS_DIR=cache)
    assert out.split() == ["cpp" if damage == "none" else "tiled"]
    assert log.count("runs without its C++ kernel") == (damage != "none"), log


@COMPILED
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_forked_after_the_first_call_computes_the_same():
    out, log = python(
        ATTEND
        + """
    import os
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(neighborhood_attention(x, x, x, 3, backend="cpp"), x) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """,
        OMP_NUM_THREADS=1,
    )
    assert out.split() == ["cpp", "0"], log


@COMPILED
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_agrees(capability):
    out, _ = python(
        """
        import torch
        from backbones.ops.neighborhood import neighborhood_attention
        torch.manual_seed(0)
        for kernel, dilation, dim in ((7, 1, 32), (3, 2, 20), (13, 1, 64)):
            qkv, bias = torch.randn(1, 19, 26, 3, 2, dim), torch.randn(2, 2 * kernel - 1, 2 * kernel - 1)
            found = []
            for backend in ("reference", "cpp"):
                leaves = [qkv.clone().requires_grad_(), bias.clone().requires_grad_()]
                out = neighborhood_attention(*leaves[0].unbind(3), kernel, dilation, leaves[1], backend=backend)
                out.square().sum().backward()
                found.append([out.detach(), *(leaf.grad for leaf in leaves)])
            for seen, wanted in zip(*found):
                torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=5e-5)
        print(torch.backends.cpu.get_cpu_capability())
        """,
        ATEN_CPU_CAPABILITY=capability,
    )
    assert out.strip().lower() == capability or out.strip() in ("NO AVX", "DEFAULT")


def test_every_source_is_in_the_digest(tmp_path, monkeypatch):
    sources = [tmp_path / path.name for path in cpp_backend.SOURCES]
    for source, path in zip(sources, cpp_backend.SOURCES, strict=True):
        source.write_bytes(path.read_bytes())
    included = {name for source in sources for name in re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE)}
    assert {source.name for source in sources} == included | {cpp_backend.MAIN.name}
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cpp_backend, "SOURCES", sources)
    monkeypatch.setattr(cpp_backend, "_compile", lambda path: path.write_bytes(b"library"))
    libraries = {cpp_backend.library()}
    for source in sources:
        source.write_text(source.read_text() + "\n")
        libraries.add(cpp_backend.library())
    assert len(libraries) == 1 + len(sources)


def test_a_second_process_waits_for_the_first_to_compile(tmp_path, monkeypatch, caplog):
    import threading

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    begun, compiled = threading.Event(), []

    def compile_slowly(path):
        compiled.append(path)
        begun.set()
        finish.wait(10)
        path.write_bytes(b"library")

    finish = threading.Event()
    monkeypatch.setattr(cpp_backend, "_compile", compile_slowly)
    found = []
    threads = [threading.Thread(target=lambda: found.append(cpp_backend.library())) for _ in range(2)]
    with caplog.at_level(logging.INFO):
        threads[0].start()
        assert begun.wait(10)
        threads[1].start()
        threads[1].join(0.2)
        assert threads[1].is_alive()  # it waits at the lock, which belongs to open files and so also holds between threads
        finish.set()
        for thread in threads:
            thread.join(10)
    assert len(compiled) == 1 and found == [compiled[0]] * 2


def test_using_chooses_for_calls_that_name_no_backend():
    q, k, v = torch.randn(3, 1, 5, 6, 2, 4)
    call = neighborhood.check(q, k, v, 3)
    automatic = neighborhood.choose(call)
    with neighborhood.using("reference"):
        assert neighborhood.choose(call) == "reference" and neighborhood.choose(call, "tiled") == "tiled"
        with neighborhood.using("tiled"):
            assert neighborhood.choose(call) == "tiled"
        assert neighborhood.choose(call) == "reference"
        seen = []
        thread = threading.Thread(target=lambda: seen.append(neighborhood.choose(call)))
        thread.start()
        thread.join()
        assert seen == [automatic]  # another thread is not concerned
    assert neighborhood.choose(call) == automatic
    with pytest.raises(ValueError, match="did you mean 'reference'"), neighborhood.using("referense"):
        pass
    with neighborhood.using("triton"), pytest.raises(ValueError, match="'triton' cannot run this call"):
        neighborhood.neighborhood_attention(q, k, v, 3)


def test_recording_counts_calls_by_their_form():
    q, k, v = torch.randn(3, 1, 5, 6, 2, 4)
    with neighborhood.recording() as calls:
        for dilation in (1, 1, (1, 2)):
            neighborhood.neighborhood_attention(q, k, v, 3, dilation)
    assert calls == {((1, 5, 6, 2, 4), (3, 3), (1, 1), False): 2, ((1, 5, 6, 2, 4), (3, 3), (1, 2), False): 1}


@pytest.mark.parametrize("name", ["stride", "is_causal", "rpb", "return_lse"])
def test_what_natten_has_and_this_op_lacks_is_said(name):
    q, k, v = torch.randn(3, 1, 5, 6, 2, 4)
    with pytest.raises(TypeError, match=f"takes no '{name}': .* here"):
        neighborhood.neighborhood_attention(q, k, v, 3, **{name: 1})
    with pytest.raises(TypeError, match="takes no 'kernel': q, k, v, kernel_size"):
        neighborhood.neighborhood_attention(q, k, v, 3, kernel=3)
    with pytest.raises(AttributeError, match="na1d is not here"):
        neighborhood.na1d  # noqa: B018
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        neighborhood.neighborhood_attention(q, k, v, 4)


def test_without_a_name_nothing_waits_for_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    started = []

    class Builder:
        done = None

        def __init__(self, command, **options):
            started.append(command)

        def poll(self):
            return Builder.done

    loads = functools.cache(lambda: None)
    monkeypatch.setattr(cpp_backend, "_load", loads)
    monkeypatch.setattr(cpp_backend, "_builder", None)
    monkeypatch.setattr(cpp_backend.subprocess, "Popen", Builder)
    x = torch.randn(1, 7, 7, 1, 16)
    call = neighborhood.check(x, x, x, 7)
    assert [neighborhood.choose(call) for _ in range(2)] == ["tiled"] * 2 and len(started) == 1
    assert "being compiled in the background" in cpp_backend.refuses_now(call)
    Builder.done = 0
    assert neighborhood.choose(call) == "cpp" and loads.cache_info().currsize == 1
    assert neighborhood.choose(call, "cpp") == "cpp"


def test_what_must_repeat_waits_for_the_compiler(monkeypatch):
    waited = []
    monkeypatch.setattr(cpp_backend, "unavailable", lambda: waited.append(1))
    neighborhood.settle(torch.nn.Linear(1, 1))
    assert not waited
    neighborhood.settle(timm.create_model("nat_mini", embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)))
    assert waited


def test_nattens_name_and_arguments():
    """HDiT's call, `natten.functional.na2d(q, k, v, kernel_size, scale=1.0)`, and NATTEN's own with every neutral argument."""
    q, k, v = torch.randn(3, 1, 9, 8, 2, 4)
    expected = neighborhood.neighborhood_attention(q, k, v, 7, scale=1.0, backend="reference")
    torch.testing.assert_close(neighborhood.na2d(q, k, v, 7, scale=1.0), expected)
    neutral = neighborhood.na2d(
        q, k, v, (7, 7), stride=(1, 1), is_causal=(False, False), scale=1.0, return_lse=False, additional_keys=None
    )
    torch.testing.assert_close(neutral, expected)
    dilated = neighborhood.na2d(q, k, v, kernel_size=3, dilation=2, backend="reference")
    torch.testing.assert_close(dilated, neighborhood.neighborhood_attention(q, k, v, 3, 2, backend="reference"))
    for name, argument in {
        "stride": 2,
        "is_causal": (True, False),
        "additional_keys": k,
        "rpb": v,
        "q_tile_shape": (8, 8),
    }.items():
        with pytest.raises(TypeError, match=f"takes no '{name}'"):
            neighborhood.na2d(q, k, v, 7, **{name: argument})
