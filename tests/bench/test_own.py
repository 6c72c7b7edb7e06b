"""A benchmark of a user's own kernel, by FILE.py:NAME."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench.__main__ import main
from bench.check import cache_folder
from nki_kernels.benchmark import Benchmark
from nki_kernels.machine.errors import OptionError

SOURCE = '''
import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np
from helper import TERMS
from nki_kernels.benchmark import Benchmark


@nki.jit
def add(x, y):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    rows, columns = x.shape
    for start in range(0, rows, nl.tile_size.pmax):
        stop = min(start + nl.tile_size.pmax, rows)
        a = nl.ndarray((stop - start, columns), dtype=x.dtype, buffer=nl.sbuf)
        b = nl.ndarray((stop - start, columns), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=a, src=x[start:stop, :])
        nisa.dma_copy(dst=b, src=y[start:stop, :])
        nisa.tensor_tensor(dst=a, data1=a, data2=b, op=nl.add)
        nisa.dma_copy(dst=out[start:stop, :], src=a)
    return out


@nki.jit
def alone(x):
    return x


@nki.jit
def tile(x):
    return x


class Add(Benchmark):
    """out = x + y, by tiles of rows."""

    kernel = add
    inputs = ("x[N, H]", "y[N, H]")
    outputs = ("out[N, H]",)
    shapes = ("9x17", "3x5")

    def reference(self, x, y):
        x, y = x.astype(np.float64), y.astype(np.float64)
        return SIGN * x + y, abs(x) + abs(y)

    def flops(self, axes):
        return TERMS * axes["N"] * axes["H"]


class Unfinished(Benchmark):
    kernel = alone
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.setenv("NKI_KERNELS_CACHE", str(tmp_path / "cache"))

    def write(name, sign="1"):
        folder = tmp_path / "own"
        folder.mkdir(exist_ok=True)
        (folder / "helper.py").write_text("TERMS = 1\n")
        path = folder / f"{name}.py"
        path.write_text(SOURCE.replace("SIGN", sign))
        return path

    return write


def run(*arguments):
    return main(["run", *arguments, "--target", "toy"])


def test_a_benchmark_is_checked_and_timed_with_its_own_shapes(mine, tmp_path, capsys):
    path, out = mine("good"), tmp_path / "out.json"
    assert run(f"{path}:Add", "--json", str(out)) == 0
    first, second = json.loads(out.read_text())["results"]
    assert (first["op"], first["shape"], second["shape"]) == ("Add", "9x17", "3x5")
    assert first["axes"] == {"N": 9, "H": 17}
    assert first["flops"] == 9 * 17
    assert first["min_hbm_bytes"] == 3 * 2 * 9 * 17
    assert first["checked_at"] == "full"
    assert first["modelled_us"] > second["modelled_us"] > 0
    assert capsys.readouterr().out.startswith("Add on toy (model, unvalidated")
    assert len(first["kernel_source_hash"]) == 64


def test_the_kernel_names_its_benchmark(mine, capsys):
    path = mine("by_kernel")
    assert run(f"{path}:add", "--shape", "130x20", "--dtype", "fp32") == 0
    assert "130x20 fp32 yes" in " ".join(capsys.readouterr().out.split())


def test_several_processes_load_the_file_themselves(mine, capsys):
    assert run(f"{mine('spawned')}:Add", "--jobs", "2") == 0
    assert "3x5" in capsys.readouterr().out


def test_a_wrong_kernel_fails_its_check_every_time(mine, capsys):
    path = mine("wrong", sign="-1")
    for _ in range(2):
        assert run(f"{path}:Add") == 1
        assert "FAILED 9x17 bfloat16: Add [9x17] bfloat16: worst at" in capsys.readouterr().out
    assert not list(cache_folder().rglob("*.json"))


def test_list_shows_its_shapes(mine, capsys):
    path = mine("listed")
    assert main(["list", f"{path}:Add"]) == 0
    out = capsys.readouterr().out
    assert "out = x + y, by tiles of rows." in " ".join(out.split())
    assert "* 9x17 9x17" in " ".join(out.split())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.py:Add", "is not a file"),
        ("{}:nothing", "has no 'nothing'; it has the benchmarks Add, Unfinished and the kernels"),
        ("{}:tile", "'tile' is the kernel of 0 benchmarks, so nothing says how to check it; write"),
        ("{}:add", "'add' is the kernel of 2 benchmarks"),
        ("{}:Unfinished", "benchmark Unfinished: inputs is (); a tuple of one or more texts is"),
    ],
)
def test_what_cannot_be_benchmarked_gets_a_clear_error(mine, capsys, name, message):
    if name == "{}:add":
        source = SOURCE.replace(
            "class Unfinished(Benchmark):\n    kernel = alone", "class B(Add):\n    pass"
        )
        path = mine("twice")
        path.write_text(source.replace("SIGN", "1"))
    else:
        path = mine("errors")
    assert run(name.format(path)) == 2
    assert message in capsys.readouterr().err


def test_an_incomplete_class_is_told_everything():
    class Bare(Benchmark):
        inputs = ("x[N", "i: int32[N]")
        outputs = ("out[N, H]",)

    with pytest.raises(OptionError) as caught:
        Bare().operator()
    text = str(caught.value)
    for part in (
        "benchmark Bare: kernel is None; name a function that is decorated with nki.jit",
        "shapes is (); a tuple of one or more texts is needed",
        "inputs has 'x[N'; allowed is 'name[A, B, ...]'",
        "reference is not defined; write this method",
        "flops is not defined; write this method",
        "outputs have the axes H, which no input has; inputs have N; name one of these",
    ):
        assert part in text


def test_methods_that_are_not_written_say_so():
    for call in (lambda: Benchmark().reference(), lambda: Benchmark().flops({})):
        with pytest.raises(OptionError, match="is not defined; write it"):
            call()


def test_operands_of_their_own_dtype_get_zeros():
    from nki_kernels.kernels.matmul.kernel import matmul

    class Indexed(Benchmark):
        """Rows by index."""

        kernel = matmul
        inputs = ("x[N, H]", "i: int32[N]")
        outputs = ("out[N, H]",)
        shapes = ("3x4",)

        def reference(self, *inputs):
            return inputs

        def flops(self, axes):
            return 0

    benchmark = Indexed()
    op = benchmark.operator()
    assert [str(operand) for operand in op.inputs] == ["x [N, H]", "i [N]"]
    assert op.summary == "Rows by index."
    x, i = benchmark.make(((3, 4), (3,)), "bfloat16", 7)
    assert (str(x.dtype), i.dtype) == ("bfloat16", np.int32)
    assert not i.any()
    assert x.astype(np.float32).std() > 0
