"""Every error of a view: it names the tensor, what is, what is allowed, and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.errors import OutOfBounds, RuleViolation, ShapeError
from tests.machine.kernels import counted, inside, loaded, refused, sbuf


def reg() -> Any:
    return nisa.register_alloc(0)


# (view of the HBM tensor h [4, 6] or the SBUF tile t [4, 6], error, what it says)
ERRORS: list[tuple[Callable[[Any, Any], Any], type, str]] = [
    (lambda h, t: t[4], OutOfBounds, "index 4 is outside dimension 0 of size 4"),
    (lambda h, t: t[0, -7], OutOfBounds, "index -7 is outside dimension 1"),
    (lambda h, t: t[:, 0:7], OutOfBounds, "index 0:7 is outside dimension 1 of size 6"),
    (lambda h, t: t[:, -7:2], OutOfBounds, "index -7:2 is outside dimension 1"),
    (lambda h, t: t[nl.ds(3, 2)], OutOfBounds, "nl.ds(3, 2) is outside dimension 0"),
    (lambda h, t: t[nl.ds(0.5, 2)], RuleViolation, "nl.ds(0.5, 2) needs ints"),
    (lambda h, t: t[:, 3:2], ShapeError, "slice 3:2 on dimension 1 of size 6 is empty"),
    (lambda h, t: t[:, 3:3].numpy(), ShapeError, "the view [None:None, 3:3] is empty"),
    (lambda h, t: h[nl.ds(4, 0)].numpy(), ShapeError, "the view [nl.ds(4, 0)] is empty"),
    (lambda h, t: h[nl.ds(5, 0)], OutOfBounds, "nl.ds(5, 0) is outside dimension 0 of size 4"),
    (lambda h, t: t[:, ::-1], ShapeError, "slice step -1 on dimension 1; steps are"),
    (lambda h, t: t[::2], ShapeError, "slice step 2 on dimension 0; partitions are"),
    (lambda h, t: t[0, 0, 0], ShapeError, "3 indices for 2 dimensions"),
    (lambda h, t: t[..., ...], ShapeError, "more than one Ellipsis"),
    (lambda h, t: t[None], RuleViolation, "index None of type NoneType; allowed are int"),
    (lambda h, t: t[True], RuleViolation, "index True of type bool"),
    (lambda h, t: t[1.0], RuleViolation, "index 1.0 of type float"),
    (lambda h, t: t[np.array([0, 1])], RuleViolation, "of type ndarray"),
    (lambda h, t: t[0.5:2], RuleViolation, "slice 0.5:2:None on dimension 0; bounds"),
    (lambda h, t: t[:, t:], RuleViolation, "on dimension 1; bounds are ints"),
    (lambda h, t: t.slice(1, 2, 2), OutOfBounds, "slice(1, 2, 2) is outside dimension 1"),
    (lambda h, t: t.slice(2, 0, 1), ShapeError, "slice on dimension 2; it has 2"),
    (lambda h, t: t.slice("x", 0, 1), ShapeError, "slice on dimension 'x'; it has 2, numbered"),
    (lambda h, t: t.slice(1, None, 2), ShapeError, "slice of (None, 2, 1); it takes ints: for"),
    (lambda h, t: t.permute(1), ShapeError, "permute of 1; it takes ints"),
    (lambda h, t: t[:, 0:1].broadcast(1, 2.0), ShapeError, "broadcast of (2.0,); it takes ints"),
    (lambda h, t: t.expand_dim(None), ShapeError, "expand_dim of (None,); it takes ints"),
    (lambda h, t: t.reshape_dim(1, 3), ShapeError, "reshape_dim of 3; it takes ints"),
    (lambda h, t: t.reshape((4, 2.0, 3)), ShapeError, "reshape of (4, 2.0, 3); it takes ints"),
    (lambda h, t: t.rearrange("ab", ("a", "b")), ShapeError, "patterns are tuples of names"),
    (lambda h, t: t.rearrange(("a",), None), ShapeError, "patterns are tuples of names and"),
    (
        lambda h, t: t.rearrange(("a", "b"), ("a", "b"), [1]),
        ShapeError,
        "fixed_sizes a dict: write",
    ),
    (lambda h, t: t.ap(7), ShapeError, "ap pattern 7; allowed are"),
    (lambda h, t: t.ap([6, 4]), ShapeError, "ap pattern [6, 4]; allowed are"),
    (lambda h, t: t.ap([[6, 4], [1, 2]], 0.5), ShapeError, "ap offset of (0.5,); it takes ints"),
    (lambda h, t: h.vector_select(None, t), RuleViolation, "vector_select(None, ...); it works"),
    (lambda h, t: t.select(1, 6), OutOfBounds, "select(1, 6) is outside dimension 1"),
    (lambda h, t: t.select(-1, 0), ShapeError, "select on dimension -1; it has 2"),
    (lambda h, t: t.select(0, reg()), RuleViolation, "select(0, <run-time index>) on chip"),
    (lambda h, t: h.select(0, "i"), RuleViolation, "select by 'i'; a run-time index is"),
    (
        lambda h, t: h.select(0, t[0, 0]),
        RuleViolation,
        "a run-time index is a register or one int32",
    ),
    (
        lambda h, t: h.select(0, t.view("int32")),
        RuleViolation,
        "one int32 or uint32 element in SBUF",
    ),
    (lambda h, t: h.select(0, h[0, 0].view("int32")), RuleViolation, "element in SBUF"),
    (
        lambda h, t: h.select(0, reg()).select(0, reg()),
        RuleViolation,
        "select on a view that already has a run-time index",
    ),
    (
        lambda h, t: t.vector_select(0, t),
        RuleViolation,
        "vector_select(0, ...); it works on dimension 0 of an HBM",
    ),
    (lambda h, t: h.vector_select(1, t), RuleViolation, "vector_select(1, ...); it works on"),
    (
        lambda h, t: h.vector_select(0, t).vector_select(0, t),
        RuleViolation,
        "vector_select on a view that already",
    ),
    (
        lambda h, t: h.vector_select(0, [1, 2]),
        RuleViolation,
        "vector_offset=[1, 2]; it must be an SBUF tile",
    ),
    (
        lambda h, t: h.vector_select(0, t)[0],
        RuleViolation,
        "dimension 0 takes part in the indirection",
    ),
    (lambda h, t: t.permute((0, 0)), ShapeError, "permute(0, 0) is no permutation of (0, 1)"),
    (lambda h, t: t.permute((1, 0)), ShapeError, "permute(1, 0) would change dimension 0"),
    (
        lambda h, t: h.vector_select(0, t).permute((1, 0)),
        ShapeError,
        "the partition (or the indirect) dimension",
    ),
    (
        lambda h, t: t.broadcast(1, 3),
        ShapeError,
        "broadcast(1, 3) of a dimension of size 6; only size 1",
    ),
    (lambda h, t: t[:, 0:1].broadcast(1, 0), ShapeError, "can be repeated, at least once"),
    (lambda h, t: t[0:1].broadcast(0, 3), ShapeError, "broadcast(0, 3) would change dimension 0"),
    (lambda h, t: t.expand_dim(3), ShapeError, "expand_dim(3); allowed are 0 to 2"),
    (lambda h, t: t.expand_dim(0), ShapeError, "expand_dim(0) would change dimension 0"),
    (
        lambda h, t: t.reshape((4, 1, 1, 1, 1, 6)),
        ShapeError,
        "a view of 6 dimensions; it has 2 to 5",
    ),
    (lambda h, t: t[:, 0:1].squeeze_dim(1), ShapeError, "a view of 1 dimensions; it has 2 to 5"),
    (lambda h, t: t.squeeze_dim(1), ShapeError, "squeeze_dim(1) of a dimension of size 6"),
    (lambda h, t: t[0:1].squeeze_dim(0), ShapeError, "squeeze_dim(0) would change dimension 0"),
    (
        lambda h, t: t.reshape_dim(1, (4, 2)),
        ShapeError,
        "reshape_dim(1, (4, 2)) does not multiply to 6",
    ),
    (lambda h, t: t.reshape_dim(1, (4, -1)), ShapeError, "does not multiply to 6"),
    (
        lambda h, t: t.reshape_dim(1, (-2, -3)),
        ShapeError,
        "does not multiply to 6; give positive sizes",
    ),
    (
        lambda h, t: t.reshape_dim(0, (2, 2)),
        ShapeError,
        "reshape_dim(0, (2, 2)) would change dimension 0",
    ),
    (
        lambda h, t: t.flatten_dims(1, 0),
        ShapeError,
        "flatten_dims(1, 0); the first dimension comes first",
    ),
    (lambda h, t: t.flatten_dims(0, 1), ShapeError, "flatten_dims(0, 1) would change dimension 0"),
    (
        lambda h, t: h[:, 0:5].flatten_dims(0, 1),
        ShapeError,
        "flatten_dims(0, 1) of dimensions that are not contiguous",
    ),
    (lambda h, t: t.reshape((4, 7)), ShapeError, "reshape(4, 7) has 28 elements, the view 24"),
    (lambda h, t: h[0, 0].reshape((-1, -1)), ShapeError, "elements, the view 1"),
    (lambda h, t: h[0, 0].reshape(()), ShapeError, "reshape() has 1 elements, the view 1"),
    (lambda h, t: t.reshape((2, 12)), ShapeError, "reshape(2, 12) would change dimension 0"),
    (
        lambda h, t: h[:, 0:5].reshape((20,)),
        ShapeError,
        "reshape(20,) needs a copy, the layout (strides (6, 1))",
    ),
    (lambda h, t: t.rearrange(("p",), ("p",)), ShapeError, "has 1 dimensions; name each of the 2"),
    (lambda h, t: t.rearrange(("p", ()), ("p",)), ShapeError, "name each of the 2"),
    (
        lambda h, t: t.rearrange(("p", "f"), ("p", "g")),
        ShapeError,
        "must name the same dimensions once each",
    ),
    (lambda h, t: t.rearrange(("p", "p"), ("p", "p")), ShapeError, "once each"),
    (
        lambda h, t: t.rearrange(("p", "f"), ("p", "f"), {"f": 5}),
        ShapeError,
        "fixed_sizes says f=5; the dimension has size 6",
    ),
    (
        lambda h, t: t[:, ::2].view("int8"),
        ShapeError,
        "view(int8) needs a contiguous last dimension",
    ),
    (lambda h, t: h.select(0, reg()).view("int8"), ShapeError, "and no run-time index"),
    (lambda h, t: h.ap([]), ShapeError, "ap pattern []; allowed are 1 to 5 pairs of ints"),
    (lambda h, t: t.ap([[6, 4]]), ShapeError, "allowed are 2 to 5 pairs"),
    (lambda h, t: h.ap([[1, 0]]), ShapeError, "[step >= 0, count >= 1]"),
    (lambda h, t: h.ap([[-1, 2]], offset=4), ShapeError, "[step >= 0, count >= 1]"),
    (lambda h, t: h.ap([[1, 1.5]]), ShapeError, "pairs of ints"),
    (lambda h, t: h.ap([[1, 2, 3]]), ShapeError, "pairs of ints"),
    (
        lambda h, t: t.ap([[5, 4], [1, 2]]),
        ShapeError,
        "ap partition step 5; the first pair walks partitions",
    ),
    (lambda h, t: h.ap([[1, 4]], offset=21).numpy(), OutOfBounds, "ap reaches element 24 of a t"),
    (lambda h, t: h.ap([[1, 4]], offset=-1).numpy(), OutOfBounds, "ap reaches element -1 of a t"),
    (
        lambda h, t: t.ap([[6, 1], [1, 4]], offset=3).numpy(),
        OutOfBounds,
        "ap reaches element 6 of a partition of 6",
    ),
    (
        lambda h, t: h.view("int16")[0, 1:2].ap([[1, 1]], dtype="int32"),
        ShapeError,
        "from offset 1, which is no whole number of int32",
    ),
    (
        lambda h, t: sbuf(4, 3, dtype="int16").ap([[1, 4], [1, 1]], dtype="int32"),
        ShapeError,
        "partitions of 6 bytes",
    ),
    (
        lambda h, t: h.ap([[6, 4], [1, 6]], scalar_offset=t, vector_offset=t),
        RuleViolation,
        "scalar_offset or vector_offset, not both",
    ),
    (
        lambda h, t: h.vector_select(0, t).ap([[6, 4], [1, 6]], vector_offset=t),
        RuleViolation,
        "ap on a view that already",
    ),
    (
        lambda h, t: h.ap([[6, 4], [1, 6]], vector_offset=t, dtype="int8"),
        RuleViolation,
        "the unit of the offset is undocumented",
    ),
    (
        lambda h, t: h.ap([[6, 1], [1, 6]], scalar_offset=reg(), indirect_dim=2),
        ShapeError,
        "ap indirect_dim on dimension 2",
    ),
    (
        lambda h, t: t.ap([[6, 1], [1, 6]], scalar_offset=reg()),
        RuleViolation,
        "scalar_offset on the partition dimension",
    ),
    (
        lambda h, t: t.ap([[6, 4], [1, 6]], vector_offset=t),
        RuleViolation,
        "vector_offset works on dimension 0 of an HBM",
    ),
    (
        lambda h, t: h.ap([[6, 4], [1, 6]], vector_offset=t, indirect_dim=1),
        RuleViolation,
        "vector_offset works on dimension 0",
    ),
    (
        lambda h, t: h.ap([[6, 3], [1, 6]], vector_offset=t[:, 0:1]),
        ShapeError,
        "vector_offset has 4 rows, the pattern 3",
    ),
    (
        lambda h, t: h.ap([[6, 4], [1, 6]], scalar_offset=2),
        RuleViolation,
        "scalar_offset by 2; a run-time index is",
    ),
    (
        lambda h, t: h.vector_select(0, t[0:1, 0:1].view("int32")).numpy(),
        OutOfBounds,
        "numpy() of row",
    ),
]


@pytest.mark.parametrize(("view", "error", "says"), ERRORS, ids=[e[2] for e in ERRORS])
def test_an_illegal_view_names_the_tensor_and_the_way_out(view, error, says):
    def body(x):
        view(x, loaded(x))

    message = refused(body, error, says, arrays=(counted(4, 6) + 100,))
    assert message.startswith(f"{__file__}:")


@pytest.mark.parametrize("view", [
    lambda h, t: t.ap([[6, 4], [1, 6]], offset=1), lambda h, t: t[:, 6:6],
    lambda h, t: t[:, nl.ds(0, 0)], lambda h, t: t[:, 6:6].expand_dim(1),
])  # fmt: skip
def test_a_view_that_nothing_can_take_is_an_error_where_it_is_used(view):
    """Published kernels form one past the end on the last turn of a loop and do not use it."""

    def formed(x):
        view(x, loaded(x))

    def used(x):
        t = loaded(x)
        nisa.memset(dst=view(x, t), value=0)

    inside(formed, counted(4, 6))
    refused(used, (OutOfBounds, ShapeError), arrays=(counted(4, 6),))


def test_hbm_may_have_more_dimensions_than_an_access():
    def body(x):
        big = nl.ndarray((2, 1, 1, 1, 4, 6), dtype=x.dtype, buffer=nl.private_hbm)
        nisa.dma_copy(dst=big[1, 0, 0, 0], src=x)
        t = loaded(big[1, 0, 0, 0])
        assert np.array_equal(t.numpy(), x.numpy())
        nisa.dma_copy(dst=big, src=big)

    refused(body, ShapeError, "an operand of 6 dimensions", arrays=(counted(4, 6),))
