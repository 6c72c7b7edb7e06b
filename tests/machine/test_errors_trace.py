"""Errors and events name the kernel's own lines, wherever the kernel was written."""

from __future__ import annotations

import inspect
from pathlib import Path

import nki.isa as nisa
import nki.language as nl
import pytest

from nki_kernels.machine import core
from nki_kernels.machine.errors import AbstractValue, RuleViolation, UninitializedRead
from nki_kernels.machine.launch import launch
from nki_kernels.machine.trace import resolve, where
from tests.child import run_python
from tests.machine.kernels import counted

pytestmark = pytest.mark.usefixtures("toy")
HERE = Path(__file__).name


def line_of(text: str) -> int:
    """The line of this file that holds `text` first."""
    lines = Path(__file__).read_text("utf-8").splitlines()
    return next(n for n, line in enumerate(lines, 1) if text in line)


def helper(tile):
    nisa.memset(tile, 1.0)  # the helper's line


def kernel(x):
    tile = nl.ndarray((2, 3), nl.float32, name="mine")  # the allocation
    helper(tile)  # the call
    nl.copy(tile)  # a wrapper of the library
    nl.fori_loop(0, 1, lambda i: helper(tile))  # the loop


def test_an_event_names_the_helper_and_its_callers():
    trace = launch(kernel, (counted(2, 3),)).trace
    memset, copy, boundary, looped = trace.events
    assert [e.opcode for e in trace] == ["memset", "tensor_copy", "loop_iteration", "memset"]
    frames = resolve(memset.site)
    assert [(f.function, f.line) for f in frames] == [
        ("helper", line_of("# the helper's line")),
        ("kernel", line_of("# the call")),
    ]
    assert all(Path(f.file).name == HERE for f in frames)
    assert frames[1].text == "helper(tile)  # the call"
    assert [f.function for f in resolve(looped.site)] == ["helper", "<lambda>", "kernel"]
    for event, text in ((copy, "# a wrapper"), (boundary, "# the loop")):
        assert [f.line for f in resolve(event.site)] == [line_of(text)]
    assert where(memset.site).endswith(f"{HERE}:{line_of('# the helper')}")
    assert repr(memset).startswith("<0 memset on ")
    assert str(line_of("# the helper")) in repr(memset)
    tile = next(t for t in trace.tiles if t.name == "mine")
    assert where(tile.site).endswith(f"{HERE}:{line_of('# the allocation')}")


def test_outside_a_kernel_there_is_no_line():
    assert where(()) == "<outside a kernel>"


def recurse(tile, depth):
    if depth:
        recurse(tile, depth - 1)
    else:
        nisa.memset(tile, 1.0)


def test_a_deep_stack_keeps_its_innermost_frames():
    def deep():
        recurse(nl.ndarray((1, 1), nl.float32), 50)

    (event,) = launch(deep).trace.events
    assert 0 < len(event.site) <= core.MAX_FRAMES
    assert resolve(event.site)[0].text == "nisa.memset(tile, 1.0)"


def unwritten():
    tile = nl.ndarray((1, 1), nl.float32)  # born here
    nl.copy(tile)  # read here


def too_wide():
    nl.ndarray((1, 2000), nl.float32)


def in_hbm():
    nl.exp(nl.ndarray((1, 1), nl.float32, buffer=nl.hbm))


def in_a_full():
    nl.full((1, 1), "one", nl.float32)


def unknown_index():
    tile = nl.ndarray((1, 1), nl.float32)
    nisa.register_load(nisa.register_alloc(), tile)


FAILURES = [(f, line_of(f"def {f.__name__}(")) for f in (too_wide, in_hbm, in_a_full)]


@pytest.mark.parametrize(("broken", "start"), FAILURES, ids=[f[0].__name__ for f in FAILURES])
def test_an_error_names_the_kernel_line_under_any_wrapper(broken, start):
    with pytest.raises(Exception, match=rf"at \S*{HERE}:{start + 1}: ") as caught:
        launch(broken)
    assert type(caught.value).__module__ == RuleViolation.__module__


@pytest.mark.parametrize("broken", [unwritten, unknown_index])
def test_an_unwritten_read_names_where_the_tile_was_born(broken):
    source, first = inspect.getsourcelines(broken)
    with pytest.raises(UninitializedRead) as caught:
        launch(broken)
    message = str(caught.value)
    assert f"{HERE}:{first + len(source) - 1}: " in message
    assert f"allocated at {inspect.getfile(broken)}:{first + 1}; " in message


def test_errors_are_what_callers_catch():
    """AWS's simulator raises AssertionError; Python's own kinds say what went wrong."""
    with pytest.raises(AssertionError):
        launch(in_hbm)
    with pytest.raises(IndexError):
        launch(lambda x: x[9], (counted(1, 1),))
    with pytest.raises(TypeError):
        launch(bool, (counted(1, 1),))
    assert issubclass(AbstractValue, TypeError)


CELL = '''
import numpy as np
import nki_kernels
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
shell.run_cell("""
import nki
import nki.isa as nisa
import nki.language as nl

@nki.jit
def kernel(x):
    tile = nl.ndarray(x.shape, x.dtype, buffer=nl.sbuf)
    if x.shape[0] == 1:
        nisa.dma_copy(dst=tile, src=x)
    result = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=result, src=tile)
    return result
""", store_history=True)
kernel = shell.user_ns["kernel"]
print(kernel(np.ones((1, 2), np.float32)).tolist())
from nki_kernels.machine.trace import resolve
from nki_kernels.machine.launch import launch
print(resolve(launch(kernel, (np.ones((1, 2), np.float32),)).trace.events[-1].site)[0])
try:
    kernel(np.ones((2, 2), np.float32))
except nki_kernels.machine.errors.UninitializedRead as error:
    print(error)
'''


def test_a_kernel_of_a_notebook_cell_has_lines(tmp_path):
    pytest.importorskip("IPython")
    env = {"IPYTHONDIR": str(tmp_path), "NEURON_PLATFORM_TARGET_OVERRIDE": "toy"}
    done = run_python(["-c", CELL], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    values, frame, message = done.stdout.splitlines()
    assert values == "[[1.0, 1.0]]"
    assert "line=11, function='kernel', text='nisa.dma_copy(dst=result, src=tile)'" in frame
    assert ":11: src reads 4 of 4 elements" in message
    assert ":7; write them first" in message


SCRIPT = """\
import sys
import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np

@nki.jit
def kernel(x):
    tile = nl.ndarray(x.shape, x.dtype, buffer=nl.sbuf)
    if len(sys.argv) == 1:
        nisa.dma_copy(dst=tile, src=x)
    result = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=result, src=tile)
    return result

print(kernel(np.full((1, 2), 3, np.float32)).tolist())
"""


@pytest.mark.parametrize("fails", [False, True])
def test_anyones_script_runs_and_its_lines_are_named(tmp_path, fails):
    script = tmp_path / "first.py"
    script.write_text(SCRIPT, "utf-8")
    args = ["-m", "nki_kernels", "run", str(script), *["fail"] * fails]
    done = run_python(args, cwd=tmp_path, env={"NEURON_PLATFORM_TARGET_OVERRIDE": "trn2"})
    if fails:
        assert done.returncode == 1
        assert "UninitializedRead: nisa.dma_copy at" in done.stderr
        assert "first.py:13: src reads 2 of 2 elements" in done.stderr
        assert "first.py:9; write them first" in done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, "[[3.0, 3.0]]\n"), done.stderr
