"""``python -m nki_kernels conformance``, on a library of a page that has AWS's file layout."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.conformance import shims
from nki_kernels.conformance.command import LISTED, Entry, commit_of
from nki_kernels.conformance.compare import difference
from tests.child import REPO, run_python

# What the command uses of AWS's harness, in as few lines as it can be.
HARNESS = '''
import contextvars
from contextlib import contextmanager
from enum import Enum
from types import SimpleNamespace as Any

class Platforms(Enum):
    TRN2 = "trn2"
    TRN3 = "trn3"
    def get_compile_target(self):
        return self.value

class Case:
    """Arguments of a kernel, its outputs and how near they must be."""
    def __init__(self, kernel, given, want, lnc=1, rtol=1e-5, declared=None):
        golden = Any(output_ndarray=declared or want, golden=want)
        self.kernel_func, self.kernel_input = kernel, given
        self.compiler_input = Any(logical_nc_config=lnc, platform_target=Platforms.TRN2)
        self.validation_args = Any(
            golden_output=golden, relative_accuracy=rtol, absolute_accuracy=0.0)
'''
NEGATIVE = """
from contextlib import contextmanager
expected = [False]
def is_in_negative_test_context():
    return expected[0]
@contextmanager
def refuses():
    expected[0] = True
    try:
        yield
    except Exception:
        pass
    else:
        raise AssertionError("was to fail")
    finally:
        expected[0] = False
"""
TESTS = """
import numpy as np
import pytest
import nki
import nki.isa as nisa
import nki.language as nl
from neuron_dtypes import static_cast
from test.utils.common_dataclasses import Case, Platforms
from test.utils.ranged_test_harness import refuses
from test.utils.test_orchestrator import Orchestrator

@nki.jit
def add_one(x, out, rows=4, poison=False):
    if rows > 8:
        raise AssertionError("too many rows")
    core = nl.program_id(0)
    count = rows // nl.num_programs()
    y = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    t = nl.ndarray((count, 4), dtype=x.dtype, buffer=nl.sbuf)
    if not poison:
        nisa.dma_copy(dst=t, src=x[core * count:(core + 1) * count, :])
    nisa.tensor_scalar(dst=t, data=t, op0=nl.add, operand0=1.0)
    nisa.dma_copy(dst=y[core * count:(core + 1) * count, :], src=t)
    nisa.dma_copy(dst=out[core * count:(core + 1) * count, :], src=t)
    return y

def case(x, want, lnc=1, **more):
    out = np.zeros_like(x)
    given = {"x": x, "out.must_alias_input": out, "rows": x.shape[0], **more}
    return Case(add_one, given, {"y": want}, lnc), out

X = np.arange(16, dtype=np.float32).reshape(4, 4)

@pytest.mark.parametrize("lnc", [1, 2])
def test_add(test_manager: Orchestrator, lnc):
    one, out = case(X, X + 1, lnc)
    test_manager.execute(one)
    assert not out.any()  # the caller's array is not the kernel's

@pytest.mark.platforms(exclude=[Platforms.TRN2])
def test_of_another_target(test_manager):
    raise RuntimeError("not on this one")

def test_refused(test_manager):
    with refuses():
        test_manager.execute(case(np.zeros((16, 4), np.float32), None)[0])
"""
RANKS = """
from test.integration.nkilib.core.cumsum.test_cumsum import Case, X, nki, nisa, nl, np, pytest
import nki.collectives as ncc

@nki.jit
def total(x, group):
    src, dst, out = (nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm) for _ in range(3))
    nisa.dma_copy(dst=src, src=x)
    ncc.all_reduce(dsts=[dst], srcs=[src], op=nl.add, replica_group=group)
    nisa.dma_copy(dst=out, src=dst)
    return out

class PerRank:
    def __init__(self, make):
        self.for_rank = make

@pytest.mark.parametrize("wrong", [0, 1])
def test_sum(test_manager, wrong):
    assert test_manager.trace_mode is None
    group = ncc.ReplicaGroup([[0, 1, 2]])
    case = Case(total, PerRank(lambda rank: {"x": X + rank, "group": group}), {})
    case.inference_args = type("Inference", (), {"collective_ranks": 3})
    want = PerRank(lambda rank: {"y": 3 * X + 3 + wrong * (rank == 2)})
    case.validation_args.golden_output = want
    test_manager.execute(case)
"""
FAULTY = """
from test.integration.nkilib.core.cumsum.test_cumsum import *

def test_wrong(test_manager):
    test_manager.execute(case(X, X + 2)[0])

def test_too_large(test_manager):
    test_manager.execute(case(np.zeros((2**19, 4), np.float32), np.zeros((2**19, 4)))[0])

def test_unwritten(test_manager):
    test_manager.execute(case(X, X + 1, poison=True)[0])
"""
PARTIAL = """
from test.integration.nkilib.core.cumsum.test_cumsum import Case, X, add_one, np, nki, pytest

@nki.jit
def both(x, out):
    return x, add_one(x, out)

def test_a_reference_for_the_second_output(test_manager):
    given = {"x": X, "out": np.zeros_like(X)}
    test_manager.execute(Case(both, given, {"y": X + 1}, declared={"x": X, "y": X}))
"""
LEFT_OUT = """
from test.integration.nkilib.core.cumsum.test_cumsum import case, np, pytest

def test_too_large(test_manager):
    test_manager.execute(case(np.zeros((2**19, 4), np.float32), np.zeros((2**19, 4)))[0])

def test_switched_off():
    pytest.skip("broken")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    files = {
        "src/nkilib_src/__init__.py": "",
        "test/utils/common_dataclasses.py": HARNESS,
        "test/utils/ranged_test_harness.py": NEGATIVE,
        "test/integration/nkilib/core/cumsum/test_cumsum.py": TESTS,
        "test/integration/nkilib/core/faulty/test_faulty.py": FAULTY,
        "test/integration/nkilib/core/partial/test_partial.py": PARTIAL,
        "test/integration/nkilib/core/left/test_out.py": LEFT_OUT,
        "test/integration/nkilib/core/ranks/test_ranks.py": RANKS,
        "test/integration/nkilib/core/faulty/test_broken.py": "import nothing\ndef test_x(): ...",
        "test/integration/nkilib/core/faulty/test_other.py":
            "from test.integration.nkilib.core.cumsum.test_cumsum import Platforms, pytest\n"
            "@pytest.mark.platforms(exclude=[Platforms.TRN2])\ndef test_x(): ...",
    }  # fmt: skip
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for directory in [root / "test", *(p for p in (root / "test").rglob("*") if p.is_dir())]:
        (directory / "__init__.py").write_text("")
    return root


def conformance(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "nki_kernels", "conformance", str(library), *arguments]
    return run_python(command, cwd=library, path=(REPO,))


def test_an_entry_that_matches(library):
    done = conformance(library, "--only", "cumsum", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    given = json.loads(done.stdout)
    assert (given["schema_version"], given["target"]) == (1, "trn2")
    assert given["commit"] == "unknown (no git checkout)"
    (entry,) = given["entries"]
    assert (entry["entry"], entry["listed"]) == ("core/cumsum/cumsum", True)
    assert (entry["runs"], entry["matches"]) == ({"1": 1, "2": 1}, {"1": 1, "2": 1})
    assert (entry["rows"], entry["refused"], entry["worst"]) == (3, 1, 0.0)
    assert (entry["findings"], entry["why_not"]) == ({}, {})


def test_entries_that_do_not(library):
    done = conformance(library, "--only", "faulty", "--json", "--megabytes", "8")
    assert done.returncode == 1
    entries = {e["entry"]: e for e in json.loads(done.stdout)["entries"]}
    assert set(entries) == {f"core/faulty/{n}" for n in ("broken", "faulty", "other")}
    faulty = entries["core/faulty/faulty"]
    # Its own four rows and the three imported ones: wrong, too large, unwritten, and add twice.
    assert (faulty["runs"], faulty["matches"]) == ({"1": 3, "2": 1}, {"1": 1, "2": 1})
    assert (faulty["skipped"], faulty["refused"]) == (1, 1)
    wrong, unwritten = faulty["why_not"]
    assert wrong.startswith("compare: Mismatch: y: error ")
    assert unwritten.startswith("compare: Mismatch: y: 16 elements not finite in one")
    (finding,) = faulty["findings"]
    assert finding.startswith("UninitializedRead: nisa.tensor_scalar at ")
    (why,) = entries["core/faulty/broken"]["why_not"]
    assert why.endswith("ModuleNotFoundError: No module named 'nothing'")
    assert entries["core/faulty/other"]["why_not"] == {"no row for trn2": 1}


def test_outputs_are_compared_by_name(library):
    """A test may have references for some of its outputs only."""
    done = conformance(library, "--only", "partial", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = json.loads(done.stdout)["entries"]
    assert entry["matches"] == {"1": 1}


def test_every_rank_has_its_inputs_and_its_reference(library):
    done = conformance(library, "--only", "ranks", "--json", "--rows", "0")
    (entry,) = json.loads(done.stdout)["entries"]
    assert (entry["runs"], entry["matches"]) == ({"1": 2}, {"1": 1})
    (why,) = entry["why_not"]
    assert why.startswith("compare: Mismatch: rank 2: y: error ")


def test_an_entry_of_which_nothing_ran_says_why(library):
    done = conformance(library, "--only", "left/out", "--json", "--megabytes", "8")
    assert done.returncode == 1
    (entry,) = json.loads(done.stdout)["entries"]
    assert (entry["rows"], entry["skipped"]) == (2, 2)
    assert set(entry["why_not"]) == {
        "left out: TooLarge: 32 MiB of inputs and outputs", "left out: Skipped: broken",
    }  # fmt: skip


def test_the_table_and_the_rows(library):
    done = conformance(library, "--verbose", "--only", "cumsum", "broken", "--rows", "1")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("nki-library commit unknown (no git checkout), trn2")
    assert "| `core/cumsum/cumsum` | 3 | 1 | 1 | 1 | 1 | 1 | 0 | 0 |  |" in lines
    assert lines[-1] == "1 of 2 entries match in every row"
    assert "core/cumsum/cumsum: test_add[1] " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "nowhere"], "no test file of "),
        ([], "no src/nkilib_src and test/integration/nkilib in "),
    ],
)
def test_nothing_to_run(library, tmp_path, arguments, says):
    done = conformance(library if arguments else tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "allowed: a checkout of aws-neuron/nki-library" in done.stderr


def test_the_commit_of_a_checkout(tmp_path):
    run = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*run, "init", "-q"], check=True)
    subprocess.run([*run, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert len(commit_of(tmp_path)) == 40


def test_an_entry_without_a_comparison_does_not_match():
    entry = Entry(LISTED[0])
    assert not entry.matched
    entry.add({"stage": "no reference", "lnc": 2, "negative": False}, passed=True)
    assert (entry.matched, entry.runs[2], entry.matches[2]) == (False, 1, 0)
    assert list(entry.why) == ["passed without a comparison (no reference)"]


# -- the comparison --------------------------------------------------------------------------------

ROW = np.linspace(1, 2, 64, dtype=np.float32)


@pytest.mark.parametrize(
    ("got", "want", "problem"),
    [
        (ROW, ROW, ""),
        (ROW * 1.009, ROW, ""),
        (ROW * 1.011, ROW, "y: error 1.1 times the allowed one"),
        (ROW.reshape(8, 8), ROW, ""),
        (ROW[:8], ROW, "y: shape [8], the reference [64]"),
        (np.array([1, 2, 3]), np.array([1, 2, 4]), "y: 1 of 3 integers differ"),
        (np.array([1.0, np.nan]), np.array([1.0, 2.0]), "y: 1 elements not finite in one"),
        (np.array([1.0, np.inf]), np.array([1.0, np.inf]), ""),
        # One small row, wrong entirely: AWS's rule, with the maximum of all rows, lets it pass.
        (np.stack([ROW * 200, ROW * 0]), np.stack([ROW * 200, ROW]), "y: error 100 times"),
        # One element far out in a large row: the norm would let it pass.
        (np.r_[ROW[:63], 2.1].repeat(2), ROW.repeat(2), "y: error"),
    ],
)
def test_the_comparison(got, want, problem):
    found = difference("y", got, want, 0.01, 0.0)
    assert found.problem.startswith(problem)
    assert bool(found.problem) == bool(problem)
    assert (found.worst > 1) == bool(problem)


# -- the stand-ins ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(shims.PACKED))
@given(data=st.data())
def test_packing_is_undone_by_unpacking(name, data):
    element = np.dtype(getattr(ml_dtypes, name.removesuffix("_x4")))
    width = 4 if name.startswith("float4") else 8
    bits = data.draw(st.lists(st.integers(0, 2**width - 1), min_size=8, max_size=8))
    values = np.array(bits, np.uint8).view(element).astype(np.float32).reshape(2, 4)
    values = np.where(np.isfinite(values), values, 0)
    packed = shims.static_cast(values, name)
    assert (packed.dtype, packed.shape) == (shims.PACKED[name], (2, 1))
    assert np.array_equal(shims.static_cast(packed, np.float32), values)


def test_casts_to_8_bits_saturate():
    big = np.array([1e6, -1e6], np.float32)
    for name in ("float8_e4m3", "float8_e4m3fn", "float8_e5m2"):
        limit = float(shims.finfo(name).max)
        assert shims.static_cast(big, name).astype(float).tolist() == [limit, -limit]
    assert shims.static_cast(np.array([2.5]), "int32").tolist() == [2]


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_every_pair_occurs(sizes):
    rows = list(shims.AllPairs([list(range(n)) for n in sizes]))
    for b, wide in enumerate(sizes):
        for a in range(b):
            seen = {(row[a], row[b]) for row in rows}
            assert len(seen) == sizes[a] * wide


def test_pairs_pass_the_filter():
    rows = list(shims.AllPairs([[1, 2], [1, 2]], filter_func=lambda r: r[0] != r[1]))
    assert rows == [[1, 2], [2, 1]]
