"""Kernels that return nothing, and arguments that are no arrays of the device."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.errors import KernelError
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import NkiWarning, Options
from nki_kernels.machine.tensor import Abstract
from tests.machine.kernels import counted, loaded, stored

pytestmark = pytest.mark.usefixtures("toy")


def test_a_missing_return_is_noticed():
    def kernel(x):
        stored(loaded(x))

    with pytest.raises(KernelError) as caught:
        launch(kernel, (counted(2, 3),))
    says = "kernel 'kernel' returns None, but wrote 't2' [2, 3] in shared HBM, allocated at "
    assert str(caught.value).startswith(says)
    assert "is the `return` missing?" in str(caught.value)
    with pytest.warns(NkiWarning, match="returns None, but wrote"):
        launch(kernel, (counted(2, 3),), options=Options(outputs="warn"))
    assert launch(kernel, (counted(2, 3),), options=Options(outputs="off")).result is None


def test_a_kernel_may_return_nothing():
    def scratch(x):
        private = nl.ndarray(x.shape, x.dtype, buffer=nl.private_hbm)
        nisa.dma_copy(dst=private, src=loaded(x))

    def in_place(x):
        stored(loaded(x))
        nisa.dma_copy(dst=x, src=nl.zeros(x.shape, x.dtype))

    x = counted(2, 3)
    assert launch(scratch, (x,)).result is None
    assert launch(in_place, (x,)).result is None
    assert not x.any()
    assert launch(in_place, (Abstract((2, 3), "float32"),)).result is None


def test_masked_arrays_are_refused():
    x = np.ma.masked_greater(counted(2, 3), 3)
    for given in (x, (x, 1)):
        with pytest.raises(KernelError, match=r"a masked array; .*pass \.filled\(value\)"):
            launch(lambda x: None, (given,))
