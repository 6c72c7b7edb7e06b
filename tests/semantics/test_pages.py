"""The generated pages: fresh, true, and what `help()` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nki.isa as nisa
import pytest

from nki_kernels import __main__ as command
from nki_kernels import toolchain
from nki_kernels.hardware import TRN1, TRN2, TRN3
from nki_kernels.machine import describe, pages
from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.instruction import REGISTRY
from nki_kernels.machine.launch import launch
from tests.embedded.harness import UNCHECKED
from tests.semantics.probes import PROBES

DIRECTORY = Path(str(nisa.__file__)).parent
SPECS = (TRN1, TRN2, TRN3)
#: Two cores meet in these; a probe on one core says nothing.
MEETINGS = frozenset({"sendrecv", "core_barrier"})


def test_the_pages_are_fresh() -> None:
    stale = pages.write(pages.pages(nisa, SPECS), DIRECTORY, check=True)
    assert not stale, f"{stale}: run `python -m nki_kernels docs`"


def test_every_instruction_is_on_the_page_of_its_family_and_in_the_matrix() -> None:
    written = pages.pages(nisa, SPECS)
    for name, ins in REGISTRY.items():
        family = str(ins.body.__module__).removeprefix("nki.isa.")
        assert f"\n## {name}\n" in written[f"README.{family}.md"]
        assert f"| [{name}](README.{family}.md#{name}) |" in written["README.md"]


def test_every_instruction_has_a_probe() -> None:
    assert set(REGISTRY) - set(PROBES) == MEETINGS


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("name", sorted(PROBES))
def test_the_matrix_says_which_generation_runs_an_instruction(name: str, spec: Any) -> None:
    """A call that breaks no other rule is refused before the first generation, and only then."""

    def kernel() -> None:
        PROBES[name]()

    if spec.generation >= describe.since(REGISTRY[name]):
        launch(kernel, target=spec, options=UNCHECKED)
        return
    with pytest.raises(RuleViolation, match=spec.name):
        launch(kernel, target=spec, options=UNCHECKED)


def test_help_shows_the_rules() -> None:
    shown = nisa.nc_matmul.__doc__ or ""
    for line in (
        "Engines: Tensor.",
        "Generations: from gen2 on.",
        "Reads: `stationary`, `moving`.",
        "Writes: `dst`.",
        "Source: nki.isa.nc_matmul.",
    ):
        assert f"\n{line}\n" in shown + "\n"
    assert "\nBuffers: " in shown
    assert "`dst` in PSUM" in shown
    assert "\nDtypes: `stationary` of float8_e4m3, " in shown
    assert "\nCost: 1 moving row per cycle" in shown


def test_help_says_how_the_engine_is_chosen() -> None:
    assert "Engines: Vector, GpSimd (All 32-bit integers in SBUF" in (
        nisa.tensor_tensor.__doc__ or ""
    )


def test_rules_of_a_switchable_check_name_it() -> None:
    assert "(check `start_partition`)" in (nisa.tensor_copy.__doc__ or "")


def test_docs_writes_what_differs_and_deletes_what_is_gone(tmp_path: Path) -> None:
    wanted = {"README.md": "matrix\n", "README.dma.md": "dma\n"}
    assert pages.write(wanted, tmp_path, check=True) == ["README.md", "README.dma.md"]
    assert not list(tmp_path.iterdir())
    pages.write(wanted, tmp_path, check=False)
    (tmp_path / "README.gone.md").write_text("old")
    (tmp_path / "README.dma.md").write_text("older")
    (tmp_path / "notes.md").write_text("mine")
    assert pages.write(wanted, tmp_path, check=False) == ["README.dma.md", "README.gone.md"]
    left = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert left == {**wanted, "notes.md": "mine"}


def test_the_command_names_stale_pages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages, "write", lambda *_, check: ["README.md"] if check else [])
    assert command.main(["docs", "--check"]) == 1
    assert capsys.readouterr().out.startswith("stale ")
    assert command.main(["docs"]) == 0


def test_the_command_needs_the_embedded_nki(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = toolchain.Toolchain("real", "0.6.0", DIRECTORY, "a test")
    monkeypatch.setattr(toolchain, "current", lambda: real)
    assert command.main(["docs"]) == 2
    assert "the nki in force is real" in capsys.readouterr().err
