"""Who chooses the backend, what `explain` says, what the errors say, and what is counted."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from nki_kernels import toolchain
from nki_kernels.torch_ops import BACKENDS, BackendError, counters, counts, explain, matmul, use
from tests.child import REPO, run_python
from tests.torch_ops.support import operands

ONES = torch.ones(2, 3), torch.ones(3, 4)

# -- precedence ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "used", "argument", "expected"),
    [
        (None, None, None, "torch"),
        ("", None, None, "torch"),
        ("0", None, None, "torch"),
        ("1", None, None, "simulator"),
        ("1", "torch", None, "torch"),
        (None, "simulator", None, "simulator"),
        (None, "simulator", "torch", "torch"),
        ("1", None, "torch", "torch"),
        ("0", "torch", "simulator", "simulator"),
    ],
)
def test_the_argument_goes_before_use_before_the_environment(
    env, used, argument, expected, monkeypatch
):
    if env is not None:
        monkeypatch.setenv("NKI_SIMULATOR", env)
    with nullcontext() if used is None else use(used):
        assert explain("matmul", *ONES, backend=argument).backend == expected
        matmul(*ONES, backend=argument)
    assert counters() == {("matmul", expected): 1}


def test_the_innermost_use_counts_and_ends_with_its_block():
    with use("simulator"):
        with use("torch"):
            matmul(*ONES)
        with pytest.raises(KeyError), use("torch"):
            raise KeyError
        matmul(*ONES)
    assert counters() == {("matmul", "torch"): 1, ("matmul", "simulator"): 1}
    matmul(*ONES)
    assert counters()["matmul", "torch"] == 2


def test_use_holds_for_its_own_thread():
    seen = []
    with use("simulator"):
        other = threading.Thread(target=lambda: seen.append(explain(matmul, *ONES).backend))
        other.start()
        other.join()
    assert seen == ["torch"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: matmul(*ONES, backend="sim"), "argument backend= is 'sim'; allowed are neuron, "),
        (lambda: use("cuda").__enter__(), "use: backend is 'cuda'; allowed are neuron, simulator"),
        (lambda: explain("addmm", *ONES), "explain: op is 'addmm'; allowed are matmul"),
        (lambda: explain(torch.addmm, *ONES), "explain: op is 'addmm'; allowed are matmul"),
        (lambda: explain("matmul", ONES[0]), r"given no b; it takes a \[M, K\], b \[K, N\]"),
        (lambda: explain("matmul", b=ONES[1]), r"given no a; it takes a"),
        (lambda: explain("matmul", *ONES, ONES[0]), r"given 3 tensors; it takes a"),
    ],
)
def test_an_unknown_name_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
    assert not counters()


def test_an_unknown_value_of_nki_simulator_is_refused(monkeypatch):
    monkeypatch.setenv("NKI_SIMULATOR", "yes")
    with pytest.raises(ValueError, match=r"NKI_SIMULATOR is 'yes'; allowed are 1 .* and 0"):
        matmul(*ONES)


# -- a backend that cannot run ---------------------------------------------------------------------

REFUSED = {
    "float64": (lambda a, b: (a.double(), b.double()), {}, ["a has dtype torch.float64; allowed"]),
    "integers": (lambda a, b: (a.int(), b.int()), {}, ["b has dtype torch.int32; allowed are"]),
    "mixed": (lambda a, b: (a, b.half()), {}, ["dtypes differ: a torch.float32, b torch.float16"]),
    "contraction": (lambda a, b: (a, b[1:]), {}, ["K is 3 in a [M, K] = [2, 3] but 2 in b"]),
    "rank": (lambda a, b: (a[None], b), {}, ["a has 3 dimensions, shape [1, 2, 3]; 2 are needed"]),
    "output": (lambda a, b: (a, b), {"out_dtype": torch.int8}, ["out_dtype is torch.int8"]),
    "many": (
        lambda a, b: (a.double(), b[1:]),
        {"out_dtype": torch.int8},
        ["3 reasons", "a has dtype", "out_dtype is torch.int8", "K is 3 in a"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_simulator_refuses_with_every_reason(name):
    change, options, texts = REFUSED[name]
    inputs = change(*ONES)
    with pytest.raises(BackendError) as caught:
        matmul(*inputs, **options, backend="simulator")
    told = explain(matmul, *inputs, backend="simulator", **options)
    for text in [*texts, "backend 'simulator', asked for by the argument backend=, cannot run"]:
        assert text in str(caught.value)
    assert not told.runs
    assert all(reason in str(caught.value) for reason in told.reasons["simulator"])
    assert not counters()


@pytest.mark.parametrize("way", ["argument", "use", "environment"])
def test_float64_is_refused_however_the_kernel_was_asked_for(way, monkeypatch):
    a, b = operands(torch.float64)
    argument = "simulator" if way == "argument" else None
    block = use("simulator") if way == "use" else nullcontext()
    if way == "environment":
        monkeypatch.setenv("NKI_SIMULATOR", "1")
    said = {
        "argument": "asked for by the argument backend=",
        "use": r"asked for by use\('simulator'\)",
        "environment": "asked for by NKI_SIMULATOR=1",
    }
    with block, pytest.raises(BackendError, match=said[way]):
        matmul(a, b, backend=argument)
    assert not counters()


def test_the_simulator_needs_the_embedded_toolchain(monkeypatch):
    real = toolchain.Toolchain("real", "0.7.0", Path("nki"), "it is installed")
    monkeypatch.setattr(toolchain, "current", lambda: real)
    with pytest.raises(BackendError, match=r"version 0\.7\.0; .*NKI_KERNELS_TOOLCHAIN=embedded"):
        matmul(*ONES, backend="simulator")
    assert explain(matmul, *ONES).reasons["torch"] == ()


# -- explain ---------------------------------------------------------------------------------------


def test_explain_says_who_asked_what_is_copied_and_what_stands_in_the_way():
    a, b = ONES[0], torch.ones(4, 3).t()
    with use("simulator"):
        told = explain(matmul, a, b)
    assert (told.backend, told.runs, told.copies, told.empty) == ("simulator", True, ("b",), False)
    assert list(told.reasons) == list(BACKENDS)
    assert told.reasons["simulator"] == told.reasons["torch"] == ()
    lines = str(told).splitlines()
    assert lines[:3] == [
        "matmul(float32[2, 3], float32[3, 4])",
        "  runs on simulator: asked for by use('simulator')",
        "  copies first, being strided: b",
    ]
    assert lines[-2:] == ["  simulator  yes", "  torch      yes"]
    assert all(line.startswith("  neuron     no: ") for line in lines[3:-2])
    assert len(lines[3:-2]) == len(told.reasons["neuron"]) >= 1
    assert not counters()


def test_explain_of_the_default():
    told = explain(matmul, ONES[0], torch.ones(4, 3).t())
    assert (told.backend, told.why, told.copies) == ("torch", "the default for tensors on cpu", ())


def test_explain_of_what_plain_torch_refuses():
    told = explain(matmul, ONES[0], ONES[0])
    assert not told.runs
    with pytest.raises(RuntimeError):
        matmul(ONES[0], ONES[0])
    (reason,) = told.reasons["torch"]  # PyTorch's own words, which differ without values
    assert "[2, 3] X [2, 3]" in reason
    assert "  raises: cannot run on torch: the default for tensors on cpu" in str(told).splitlines()


def test_explain_of_an_empty_call():
    told = explain(matmul, torch.ones(0, 3), torch.ones(4, 3).t(), backend="simulator")
    assert (told.runs, told.empty, told.copies) == (True, True, ())
    assert "  an input is empty: the result is made without a kernel" in str(told).splitlines()


# -- counters, imports -----------------------------------------------------------------------------


class YieldingCounter(Counter):
    """Lets another thread run between the read and the write of `+=`."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        time.sleep(0)
        return value


def test_counts_of_many_threads_add_up(monkeypatch):
    monkeypatch.setattr(counts, "_counts", YieldingCounter())

    def work():
        for _ in range(200):
            counts.count("probe", "torch")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters()["probe", "torch"] == 800


def test_counters_are_a_copy():
    matmul(*ONES)
    counters()["matmul", "torch"] += 5
    assert counters()["matmul", "torch"] == 1


def test_nothing_else_imports_torch():
    code = (
        "import sys, nki_kernels, nki_kernels.ops, nki_kernels.operators, nki_kernels.profiler\n"
        "before = 'torch' in sys.modules\n"
        "import nki_kernels.torch_ops\n"
        "print(before, 'torch' in sys.modules, 'torch_neuronx' in sys.modules)"
    )
    done = run_python(["-c", code], cwd=REPO)
    assert (done.returncode, done.stdout.split()) == (0, ["False", "True", "False"]), done.stderr
