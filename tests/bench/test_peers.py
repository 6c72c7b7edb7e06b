"""AWS's kernels beside ours, on a library and tutorials of a page that have AWS's file layout."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.__main__ import main
from bench.entries import ENTRIES
from bench.peer_calls import schedule
from bench.peer_report import peers_markdown, peers_table
from bench.peer_table import PEERS, SDK
from bench.peers import PeerResult, peer_work
from bench.record import BenchError
from bench.table import WIDTH
from nki_kernels.operators.shapes import parse
from tests.bench.test_record import RESULT
from tests.child import REPO, run_python

KERNEL = """
import nki
import nki.isa as nisa
import nki.language as nl

def _add(x):
    y = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    t = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    {load}
    nisa.tensor_scalar(dst=t, data=t, op0=nl.add, operand0=1.0)
    nisa.dma_copy(dst=y, src=t)
    return y
"""
LOAD = "nisa.dma_copy(dst=t, src=x)"
MLP = """
@nki.jit
def mlp(hidden_tensor, gate_proj_weights_tensor, up_proj_weights_tensor, down_proj_weights_tensor):
    print("noise")
    if nl.num_programs() > 1:
        raise AssertionError("[INTERNAL_ERROR] [NCC_INKI016] Kernel validation exception: one core")
    return _add(hidden_tensor.reshape(hidden_tensor.shape[1:]))
"""
REFUSES = """
@nki.jit
def RoPE(x_in, cos, sin, lnc_shard):
    raise AssertionError("[INTERNAL_ERROR] [NCC_INKI016] Kernel validation exception: too many "
        "heads - Please check the validation message and adjust kernel inputs accordingly")
"""
SLOW = """
@nki.jit
def rope_hf(**given):
    while True:
        pass
"""
TUTORIAL = """
@nki.jit
def nki_matmul_basic_(lhsT, rhs):
    return _add(lhsT)
"""


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory):
    root = tmp_path_factory.mktemp("aws")
    package = "library/src/nkilib_src/nkilib/core"
    plain, unwritten = KERNEL.format(load=LOAD), KERNEL.format(load="")
    files = {
        f"{package}/mlp/mlp.py": unwritten + MLP,
        f"{package}/embeddings/rope.py": plain + REFUSES,
        f"{package}/embeddings/rope_hf.py": plain + SLOW,
        "sdk/nki/examples/matrix_multiplication/matrix_multiplication_nki_kernels.py":
            plain + TUTORIAL,
    }  # fmt: skip
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def peers(checkouts: Path, *arguments: str) -> tuple[dict[str, Any], str, str]:
    """Return the one record of a run of the command, what it printed, and its Markdown."""
    files = checkouts / "out.json", checkouts / "out.md"
    command = ["-m", "bench", "peers", *arguments, "--library", str(checkouts / "library")]
    command += ["--sdk", str(checkouts / "sdk")]
    command += ["--json", str(files[0]), "--markdown", str(files[1])]
    done = run_python(command, cwd=REPO, env={"NKI_KERNELS_CACHE": str(checkouts / "cache")})
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(files[0].read_text())["results"]
    return record, done.stdout, files[1].read_text()


def test_a_kernel_that_runs_stands_beside_ours(checkouts):
    record, text, markdown = peers(checkouts, "nki_matmul_basic_", "--shape", "16x32x8")
    assert (record["op"], record["shape"], record["lnc"]) == ("matmul_tn", "16x32x8", 1)
    assert (record["failure"], record["finding"]) == (None, None)
    # A [K, M] in and out again in bf16; three instructions.
    assert (record["hbm_bytes"], record["instructions"]) == (2 * 2 * 8 * 16, 3)
    ours = record["ours"]
    assert (ours["op"], ours["correct"], ours["dtype"]) == ("matmul_tn", True, "bfloat16")
    assert record["ratio"] == record["us_per_core"] / ours["modelled_us"]
    assert f"{record['us_per_core']:.1f}" in text
    assert "beside matmul_tn on trn2 (model, unvalidated)" in text
    assert "| `nki_matmul_basic_` | `matmul_tn` | 16x32x8 |" in markdown


def test_a_kernel_that_does_not_run_says_why(checkouts):
    record, text, markdown = peers(checkouts, "RoPE", "--shape", "1x5x16x8x4")
    assert (record["us_per_core"], record["ratio"]) == (None, None)
    assert record["failure"] == (
        "1 core: AssertionError: too many heads; 2 cores: AssertionError: too many heads"
    )
    assert "1x5x16x8x4 does not run: 1 core: AssertionError: too many heads" in text
    assert record["failure"] in markdown


def test_a_kernel_without_end_is_ended(checkouts):
    record, _, _ = peers(checkouts, "rope_hf", "--shape", "1x5x16x8x4", "--seconds", "2")
    assert record["failure"] == (
        "1 core: more than 2 s on this host; 2 cores: more than 2 s on this host"
    )


def test_findings_are_told_and_the_time_is_taken(checkouts):
    record, text, _ = peers(checkouts, "mlp", "--shape", "16x32x48")
    assert record["lnc"] == 1  # two cores are refused
    assert record["finding"].startswith("UninitializedRead: nisa.tensor_scalar at ")
    assert "the checks say: UninitializedRead" in text
    assert "noise" not in text


# -- what is asked for -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "no peer nothing; there are RoPE, "),
        ([], "no checkout of what was asked for is named; name it with --library PATH "),
        (["mlp", "--sdk", "{sdk}"], "no checkout of what was asked for is named"),
        (["--library", "{sdk}"], "no src/nkilib_src/nkilib in it; name a checkout of aws-neuron/"),
        (["--sdk", "{library}"], "no nki/examples in it; name a checkout of aws-neuron/aws-"),
        (["--target", "trn9"], "--target: "),
        (["mlp", "--library", "{library}", "--json", "/nowhere/x.json"], "does not exist"),
    ],
)
def test_requests_that_cannot_be_met(checkouts, capsys, arguments, says):
    folders = {name: checkouts / name for name in ("library", "sdk")}
    given = [argument.format(**folders) for argument in arguments]
    assert main(["peers", *given]) == 2
    assert says in capsys.readouterr().err


def test_an_operator_brings_all_its_peers():
    here = Path(__file__).parent
    works = {"library": None, SDK: None}
    with pytest.raises(BenchError, match="no checkout"):
        peer_work(["mlp"], [], "trn2", works, 1)
    assert {p.name for p in PEERS if p.op == "rope"} == {"RoPE", "rope_hf"}
    assert not (here / "src").exists()


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.name)
def test_every_peer_has_an_operator_and_legal_shapes(peer):
    op = ENTRIES[peer.op].op
    for shape in (*peer.shapes, *peer.device):
        assert set(parse(op, shape).axes) == set(op.axis_order)
    assert set(peer.device) <= set(peer.shapes)


# -- arguments -------------------------------------------------------------------------------------


@given(st.data())
def test_a_schedule_has_every_row_of_every_expert_once(data):
    experts, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    tokens = data.draw(st.integers(1, 12))
    chosen = np.array([data.draw(st.permutations(range(experts)))[:2] for _ in range(tokens)])
    order, owner = schedule(chosen, experts, size)
    assert len(order) == size * len(owner)
    rows = order.reshape(-1, size)
    for expert in range(experts):
        mine = rows[owner[:, 0] == expert]
        wanted = np.flatnonzero((chosen == expert).any(axis=1))
        assert np.array_equal(mine[mine >= 0], wanted)
        # Only the last block of an expert is padded, and by less than a block.
        assert (mine < 0).sum() < size


# -- the table -------------------------------------------------------------------------------------

OURS = dataclasses.replace(
    RESULT, op="rope", modelled_us=50.0, limiting_engine="gpsimd", percent_of_roofline=60.0,
    hbm_read_bytes=1_000_000, hbm_write_bytes=2_000_000, correct=True, failure=None,
)  # fmt: skip
ROW = PeerResult(
    peer="RoPE", op="rope", shape="1x8x4096x128x64", target="trn2", commit="0123456789abcdef",
    differs="head size outermost", lnc=2, window=16, us_per_core=100.0, limiting_engine="vector",
    busy_percent=65.4, hbm_bytes=4_000_000, instructions=11, percent_of_roofline=30.0,
    device="42 us on trn2", ours=dataclasses.asdict(OURS), ratio=2.0,
)  # fmt: skip


def test_the_table_names_sources_and_keeps_its_width():
    refused = dataclasses.replace(ROW, us_per_core=None, ratio=None, failure="too many heads " * 20)
    text = peers_table([ROW, refused])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.startswith("RoPE (0123456789ab) beside rope on trn2 (model, unvalidated)")
    row = next(line for line in text.splitlines() if line.startswith(ROW.shape))
    assert re.split(r"\s{2,}|(?<=\d) (?=\d)", row.partition(" ")[2].strip())[0] == "100.0"
    assert row.split()[1:] == [
        "100.0", "2", "16", "vector", "65", "%", "4.0", "30", "50.0", "gpsimd", "3.0", "60", "2.00",
    ]  # fmt: skip
    assert "differs: head size outermost" in text
    assert "42 us on trn2 (device)" in text


def test_ours_that_fails_has_no_time_and_no_ratio():
    ours = dataclasses.replace(OURS, correct=False, modelled_us=None, failure="element 3 is wrong")
    text = peers_markdown([dataclasses.replace(ROW, ours=dataclasses.asdict(ours), ratio=None)])
    assert "| FAILED | - | - | - | - |" in text
    assert "ours FAILED: element 3 is wrong" in text
