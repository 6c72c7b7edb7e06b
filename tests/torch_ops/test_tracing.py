"""The op without values: fakes, export, compile, opcheck, vmap."""

from __future__ import annotations

import io

import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from nki_kernels.operators import OPERATORS
from nki_kernels.torch_ops import counters, matmul, reset_counters, use
from nki_kernels.torch_ops.rows import ROWS
from tests.torch_ops.support import DTYPES, compare, operands, products, same_bits

OP = torch.ops.nki_kernels.matmul.default


class Product(torch.nn.Module):
    """A product between two operations of PyTorch."""

    def forward(self, a, b):
        return matmul(a * 2, b) + 1


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


#: Ops whose operators have no output to compare, and so no place in `OPERATORS`.
IN_PLACE = {"kv_cache_write", "kv_cache_write_paged"}
#: Operators that PyTorch cannot call yet: this set only ever shrinks. `window_attention` is
#: `causal_attention` with its window as an axis, for benchmarks.
WITHOUT = {"matmul_mx", "window_attention"}


def test_every_operator_has_a_torch_op_or_is_known_to_have_none():
    assert set(ROWS) == (set(OPERATORS) - WITHOUT) | IN_PLACE
    for name in ROWS:
        assert hasattr(torch.ops.nki_kernels, name)


# -- shapes without values -------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_a_fake_call_has_shape_dtype_and_strides_and_runs_nothing(out_dtype):
    with FakeTensorMode():
        a = torch.empty(5, 7, dtype=torch.bfloat16).t().contiguous().t()
        c = matmul(a, torch.empty(7, 3, dtype=torch.bfloat16), out_dtype=out_dtype)
    assert (c.shape, c.stride()) == ((5, 3), (3, 1))
    assert c.dtype == (out_dtype or torch.bfloat16)
    assert not counters()


def test_a_meta_call_has_a_shape_and_runs_nothing():
    with use("simulator"):
        c = matmul(torch.empty(0, 7, device="meta"), torch.empty(7, 3, device="meta"))
    assert (c.device.type, c.shape) == ("meta", (0, 3))
    assert not counters()


def test_a_fake_of_the_wrong_rank_is_refused_in_the_words_of_the_contract():
    with pytest.raises(ValueError, match=r"a has 3 dimensions.*2 are needed: a \[M, K\]"):
        matmul(torch.empty(2, 5, 7, device="meta"), torch.empty(7, 3, device="meta"))


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_rows(strict):
    a, b = operands(torch.float32)
    rows = torch.export.Dim("rows")
    program = torch.export.export(
        Product(), (a, b), dynamic_shapes=({0: rows}, None), strict=strict
    )
    assert not counters()
    (node,) = [n for n in program.graph.nodes if n.target is OP]
    assert isinstance(node.meta["val"].shape[0], torch.SymInt)
    assert "backend" not in node.kwargs
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    for module in (program.module(), torch.export.load(saved).module()):
        for m in (2, 9, a.shape[0] + 4):
            x = torch.cat([a, a])[:m].contiguous()
            reset_counters()
            with use("simulator"):
                got = module(x, b)
            assert counters() == {("matmul", "simulator"): 1}
            assert same_bits(got, matmul(x * 2, b, backend="simulator") + 1)


# -- compile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_call_and_its_gradients_are_those_of_the_eager_call(dtype):
    inputs = [operands(DTYPES[dtype]) for _ in range(2)]
    results = []
    for function, pair in zip((Product(), _compiled(Product())), inputs, strict=True):
        a, b = (x.requires_grad_() for x in pair)
        reset_counters()
        with use("simulator"):
            c = function(a, b)
            c.sum().backward()
        assert products(counters()) == {"simulator": 3}
        results.append((c, a.grad, b.grad))
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))


def _compiled(function, **options):
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def test_a_graph_reads_the_request_when_it_runs(monkeypatch):
    a, b = operands(torch.float32)
    a.requires_grad_()
    function = _compiled(Product())
    for backend in ("simulator", "torch", "simulator", "torch"):
        monkeypatch.setenv("NKI_SIMULATOR", "1" if backend == "simulator" else "0")
        reset_counters()
        function(a, b).sum().backward()
        assert products(counters()) == {backend: 2}


def test_the_argument_is_part_of_the_graph():
    a, b = operands(torch.float32)
    a.requires_grad_()
    function = _compiled(lambda a, b: matmul(a, b, backend="simulator"))
    with use("torch"):
        got = function(a, b)
    got.sum().backward()
    compare(got, a, b, "compiled")
    assert products(counters()) == {"simulator": 2}


def test_dynamic_rows_compile_once():
    compiles = CompileCounterWithBackend("aot_eager")
    function = torch.compile(Product(), backend=compiles, fullgraph=True, dynamic=True)
    b = operands(torch.float32)[1]
    for m in (3, 5, 11):
        a = torch.ones(m, b.shape[0])
        assert same_bits(function(a, b), Product()(a, b))
    assert compiles.frame_count == 1


def test_use_inside_a_compiled_function_breaks_the_graph_and_is_obeyed():
    def function(a, b):
        with use("simulator"):
            return matmul(a * 2, b)

    a, b = operands(torch.float32)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        _compiled(function)(a, b)
    assert not counters()
    torch._dynamo.reset()
    got = torch.compile(function, backend="aot_eager")(a, b)
    assert counters() == {("matmul", "simulator"): 1}
    compare(got, a * 2, b, "with a graph break")


# -- opcheck, vmap ---------------------------------------------------------------------------------


def _strided(x):
    return x.t().contiguous().t()


SAMPLES = {
    "dense": lambda a, b: (a, b),
    "strided": lambda a, b: (_strided(a), _strided(b)),
    "gradients": lambda a, b: (a.requires_grad_(), b.requires_grad_()),
    "one strided gradient": lambda a, b: (_strided(a).requires_grad_(), b),
    "no rows": lambda a, b: (a[:0], b),
}


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_on_plain_torch(dtype, sample, out_dtype):
    inputs = SAMPLES[sample](*operands(DTYPES[dtype], (5, 4, 6)))
    opcheck(OP, inputs, {"out_dtype": out_dtype, "backend": "torch"})


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_on_the_simulator(sample):
    inputs = SAMPLES[sample](*operands(torch.bfloat16, (5, 4, 6)))
    opcheck(OP, inputs, {"backend": "simulator"})
    assert ("matmul", "torch") not in counters()
