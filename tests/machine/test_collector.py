"""A launch pauses the cycle collector and leaves it as it was."""

from __future__ import annotations

import gc

import nki
import pytest

from nki_kernels.machine.launch import launch


@pytest.mark.parametrize("enabled", [True, False])
def test_a_launch_leaves_the_collector_as_it_was(enabled: bool) -> None:
    states = []

    @nki.jit
    def kernel(fail: bool) -> None:
        states.append(gc.isenabled())
        if fail:
            raise KeyError("of the kernel")

    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        launch(kernel, (False,), {}, target="toy")
        assert gc.isenabled() == enabled
        with pytest.raises(KeyError):
            launch(kernel, (True,), {}, target="toy")
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert states == [False, False]
