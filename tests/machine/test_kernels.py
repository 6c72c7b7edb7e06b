"""Kernels as objects: decorating, nesting, annotations, looking at tiles in the middle."""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl
import nki.typing as nt
import numpy as np
import pytest

from nki_kernels.machine.errors import KernelError, ShapeError
from nki_kernels.machine.launch import launch
from tests.machine.kernels import counted, double, loaded, sbuf, stored

pytestmark = pytest.mark.usefixtures("toy")


def test_jit_bare_with_keywords_and_again():
    def plain(x):
        """Says what it does."""
        return stored(loaded(x))

    array = counted(2, 2)
    for kernel in (nki.jit(plain), nki.jit(mode="trace")(plain), nki.jit(nki.jit(plain))):
        assert type(kernel) is nki.Kernel
        assert (kernel.__name__, kernel.__doc__) == ("plain", "Says what it does.")
        assert repr(kernel) == "<nki kernel 'plain'>"
        assert np.array_equal(kernel(array), array)
    assert np.array_equal(nki.simulate(plain)(array), array)
    assert np.array_equal(nki.simulate(nki.jit(plain))(x=array), array)


def test_a_kernel_inside_a_kernel_is_inlined():
    @nki.jit
    def outer(x):
        return double(double(x))

    done = launch(outer, (counted(2, 3),))
    assert np.array_equal(done.result, 4 * counted(2, 3))
    assert len(done.trace) == 2 * len(launch(double, (counted(2, 3),)).trace)


def test_what_is_no_kernel_is_refused():
    with pytest.raises(KernelError, match="launch: 3 is no kernel; pass a function or"):
        launch(3)


CALLS = {
    "nl.ndarray": lambda: nl.ndarray((1, 1), nl.float32),
    "nisa.memset": lambda: nisa.memset(None, 0),
    "nisa.get_nc_version": nisa.get_nc_version,
    "nl.fori_loop": lambda: nl.fori_loop(0, 1, print),
    "nisa.register_alloc": nisa.register_alloc,
    "nl.program_id": nl.program_id,
    "nl.device_print": lambda: nl.device_print("", None),
}


@pytest.mark.parametrize("name", CALLS)
def test_outside_a_kernel_nothing_runs(name):
    with pytest.raises(KernelError) as caught:
        CALLS[name]()
    assert str(caught.value).startswith(f"{name} outside a kernel: NKI calls need a running kernel")


def test_a_failed_kernel_leaves_no_run_behind():
    with pytest.raises(ZeroDivisionError):
        launch(lambda: 1 / 0)
    with pytest.raises(KernelError, match="outside a kernel"):
        nl.program_id()


@nki.jit
def annotated(x: nt.tensor[2, 3], scale: float = 1.0):
    return stored(loaded(x))


@nki.jit
def annotated_any(x: nt.tensor, y: nt.tensor[4] = None, z: tensor_of_another_library = None):  # noqa: F821
    return stored(loaded(x))


def test_a_tensor_annotation_states_the_shape():
    assert np.array_equal(annotated(counted(2, 3)), counted(2, 3))
    assert np.array_equal(annotated_any(counted(1, 3), counted(4), None), counted(1, 3))
    says = r"kernel 'annotated', argument 'x': shape \[3, 2\]; it is annotated nt.tensor\[2, 3\]"
    with pytest.raises(ShapeError, match=says):
        annotated(counted(3, 2))
    with pytest.raises(ShapeError, match=says):
        annotated(x=counted(3, 2))
    with pytest.raises(ShapeError, match=r"argument 'y': shape \[5\]; it is annotated"):
        annotated_any(counted(1, 3), counted(5))
    assert repr(nt.tensor) == "nt.tensor"


# -- looking at tiles ------------------------------------------------------------------------------


def test_tiles_can_be_printed_in_the_middle(capsys):
    @nki.jit
    def kernel(x):
        tile = sbuf(1, 3)
        print(tile)
        nisa.dma_copy(dst=tile[:, 1:2], src=x)
        nl.device_print("now", tile)
        print(repr(tile), tile.numpy().dtype)

    kernel(np.array([[7]], np.float32))
    assert capsys.readouterr().out == (
        "<NkiTensor 't1' [1, 3] float32 in sbuf>:\n[[nan nan nan]]\n"
        "now <NkiTensor 't1' [1, 3] float32 in sbuf>:\n[[nan  7. nan]]\n"
        "<NkiTensor 't1' [1, 3] float32 in sbuf> float32\n"
    )


def test_printing_never_ends_the_run(capsys):
    @nki.jit
    def kernel(x):
        print(x.select(0, nisa.register_alloc()))
        print(x.select(0, nisa.register_alloc(9)))

    kernel(counted(2, 2))
    first, second = capsys.readouterr().out.splitlines()
    assert "register 1: read before a value was moved" in first
    assert "numpy() reaches element 19 of a tile of 4 elements" in second


def test_nothing_is_assigned_to_a_tile():
    def kernel(x):
        x[0] = 1

    with pytest.raises(KernelError, match="assignment to a tensor does not exist on the device"):
        launch(kernel, (counted(2, 2),))
