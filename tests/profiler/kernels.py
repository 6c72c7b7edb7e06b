"""Small kernels for the tests of what a profile shows."""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl


@nki.jit
def many(x, rounds):
    """Eight instructions a round on four engines; out = x, whatever `rounds` is."""
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    weight = nl.ndarray((x.shape[0], x.shape[0]), dtype=x.dtype, buffer=nl.sbuf)
    nisa.memset(dst=weight, value=0.0)
    for _ in range(rounds):
        a = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
        b = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
        c = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.psum)
        nisa.dma_copy(dst=a, src=x)
        nisa.nc_matmul(dst=c, stationary=weight, moving=a)
        nisa.activation(dst=b, op=nl.exp, data=c)
        nisa.tensor_copy(dst=b, src=c, engine=nisa.engine.vector)
        nisa.tensor_tensor(dst=b, data1=b, data2=a, op=nl.add, engine=nisa.engine.gpsimd)
        nisa.tensor_scalar(dst=b, data=b, op0=nl.multiply, operand0=1.0)
        nisa.activation(dst=b, op=nl.copy, data=b)
        nisa.dma_copy(dst=out, src=a)
    return out


@nki.jit
def awkward(x):
    """Its text is markup that a careless page would run: </script><img src=x onerror=1>."""
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf, name="<b>tile</b>")
    nisa.dma_copy(dst=tile, src=x)  # </script><script>document.title = "owned"</script> \u2028
    nisa.dma_copy(dst=out, src=tile)
    return out


def two_cores_kernel(x):
    """Each core copies its half of the rows."""
    rows = x.shape[0] // 2
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    start = nl.program_id(0) * rows
    tile = nl.ndarray((rows, x.shape[1]), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x[start : start + rows, :])
    nisa.dma_copy(dst=out[start : start + rows, :], src=tile)
    return out


@nki.jit
def looped(x):
    """A device loop: every iteration is a barrier for all engines."""
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)

    def body(_):
        nisa.tensor_tensor(dst=tile, data1=tile, data2=tile, op=nl.add)
        nisa.activation(dst=tile, op=nl.exp, data=tile)

    nl.fori_loop(0, 5, body)
    nisa.dma_copy(dst=out, src=tile)
    return out


def exchange(x):
    """Two cores swap a tile and meet at a barrier."""
    rows = x.shape[0]
    me = nl.program_id(0)
    out = nl.ndarray((2 * rows, x.shape[1]), dtype=x.dtype, buffer=nl.shared_hbm)
    mine = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    theirs = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=mine, src=x)
    for _ in range(1 + 3 * me):  # core 1 is late
        nisa.activation(dst=mine, op=nl.exp, data=mine)
    nisa.sendrecv(src=mine, dst=theirs, send_to_rank=1 - me, recv_from_rank=1 - me, pipe_id=0)
    nisa.dma_copy(dst=out[me * rows : (me + 1) * rows, :], src=theirs)
    nisa.core_barrier(out, (0, 1))
    nisa.dma_copy(dst=mine, src=out[me * rows : (me + 1) * rows, :])
    nisa.dma_copy(dst=out[me * rows : (me + 1) * rows, :], src=mine)
    return out


@nki.jit
def trickle(x, rounds):
    """The rows of x one by one in one queue: its triggers take all the time."""
    out = nl.ndarray((1, x.shape[1]), dtype=x.dtype, buffer=nl.shared_hbm)
    for _ in range(rounds):
        tile = nl.ndarray((1, x.shape[1]), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(
            dst=tile, src=x[0:1, :], dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.sync
        )
    nisa.dma_copy(dst=out, src=tile)
    return out


@nki.jit
def empty(x):
    """Nothing to do."""


@nki.jit
def broken(x):
    """Reads a tile that nothing wrote."""
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=out, src=tile)
    return out


@nki.jit
def raising(x):
    """A mistake of plain Python."""
    return x.shape[7]
