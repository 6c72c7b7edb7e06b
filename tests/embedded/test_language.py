"""The nl wrappers: each is one instruction on a fresh tile; allocation, constants, inspection."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.errors import KernelError, ShapeError
from nki_kernels.machine.launch import launch
from tests.embedded.harness import (
    HBM,
    HOSTS,
    PSUM,
    SBUF,
    cast,
    refused,
    same,
    sb,
    tile,
    traced,
    values,
)
from tests.embedded.test_activation import FUNCTIONS
from tests.embedded.test_elementwise import BITS, FORMULAS, GEN4, each

F32 = np.float32
A = np.array([[1.5, -2, 3, 0.25], [0, 7, -1, 2]], F32)
B = np.array([[1.5, 2, -4, 8], [1, 0, -1, 2]], F32)


@pytest.mark.parametrize("name", [*FORMULAS, *GEN4])
def test_binary_functions_of_tiles_and_numbers(name):
    function = getattr(nl, name)

    def kernel(a, b):
        x, y = tile(a), tile(b)
        return function(x, y), function(x, 2), function(2.0, x), function(x, y, dtype=nl.bfloat16)

    formula = (FORMULAS | GEN4)[name]
    target = "trn3" if name in GEN4 else "toy"
    both, right, left, narrow = values(kernel, A, B, target=target)
    same(both, cast(each(formula, A, B), nl.float32))
    same(right, cast(each(formula, A, np.full_like(A, 2)), nl.float32))
    same(left, cast(each(formula, np.full_like(A, 2), A), nl.float32))
    same(narrow, cast(each(formula, A, B), nl.bfloat16))


@pytest.mark.parametrize("name", [*BITS, "left_shift", "right_shift"])
def test_bit_functions(name):
    functions = BITS | {"left_shift": lambda x, y: x << y, "right_shift": lambda x, y: x >> y}
    a, b = np.array([[12, 10]], np.uint8), np.array([[2, 3]], np.uint8)

    def kernel(x, y):
        return getattr(nl, name)(tile(x), tile(y)), getattr(nl, name)(tile(x), 2)

    both, number = values(kernel, a, b)
    same(
        both, np.array([[functions[name](int(x), int(y)) for x, y in [(12, 2), (10, 3)]]], np.uint8)
    )
    same(number, np.array([[functions[name](x, 2) for x in (12, 10)]], np.uint8))


def test_invert_and_power():
    def kernel(x, y):
        return nl.invert(tile(x)), nl.power(tile(y), tile(y))

    inverted, powers = values(kernel, np.array([[0x0F]], np.uint8), np.array([[2, 3]], F32))
    same(inverted, np.array([[0xF0]], np.uint8))
    same(powers, np.array([[4, 27]], F32))


#: The instruction extrapolates outside [-pi, pi]; the function of the language does not say so.
@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"copy"}))
def test_unary_functions_are_the_activation_of_that_name(name):
    low, high = FUNCTIONS[name][3]
    x = np.linspace(max(low, -3), min(high, 3), 6, dtype=F32).reshape(2, 3)

    def kernel(source):
        t = tile(source)
        direct = sb(2, 3)
        nisa.activation(direct, getattr(nl, name), t)
        return direct, getattr(nl, name)(t), getattr(nl, name)(t, dtype=nl.bfloat16)

    direct, wrapped, narrow = values(kernel, x)
    same(wrapped, direct)
    same(narrow, direct.astype(HOSTS[nl.bfloat16]))


def test_a_function_without_a_tile_is_refused():
    refused(lambda: nl.add(1, 2), "nl.add(1, 2)", "one operand must be a tile")


def test_load_copy_and_store():
    def kernel(source):
        loaded, narrow = nl.load(source), nl.load(source, dtype=nl.bfloat16)
        copied, wide = nl.copy(loaded), nl.copy(narrow, dtype=nl.float32)
        out = nl.ndarray(source.shape, nl.float32, buffer=HBM)
        nl.store(out, copied)
        return out, narrow, wide

    x = np.array([[1 + 2.0**-10, 3]], F32)
    out, narrow, wide = values(kernel, x)
    same(out, x)
    same(narrow, np.array([[1, 3]], HOSTS[nl.bfloat16]))
    same(wide, np.array([[1, 3]], F32))


def test_psum_cannot_be_stored():
    def call():
        source = nl.zeros((1, 1), nl.float32, buffer=PSUM)
        nl.store(nl.ndarray((1, 1), nl.float32, buffer=HBM), source)

    refused(call, "src is in PSUM", "tensor_copy or activation")


def test_load_and_store_cross_between_hbm_and_chip():
    def hbm():
        return nl.ndarray((1, 1), nl.float32, buffer=HBM)

    refused(lambda: nl.load(sb(1, 1)), "nl.load: src is <NkiTensor", "in sbuf", "nl.copy")
    says = ("an SBUF tile goes to an HBM tensor", "nisa.tensor_copy")
    refused(lambda: nl.store(sb(1, 1), sb(1, 1)), *says)
    refused(lambda: nl.store(hbm(), hbm()), *says)
    refused(lambda: nl.store(hbm(), 3.0), "nl.store: value is float 3.0", "must be a tile")


@pytest.mark.parametrize("buffer", [SBUF, PSUM, HBM, nl.private_hbm])
@pytest.mark.parametrize("dtype", [nl.float32, nl.int16])
def test_filled_tensors(buffer, dtype):
    def kernel():
        zeros, ones = nl.zeros((2, 3), dtype, buffer=buffer), nl.ones((2, 3), dtype, buffer=buffer)
        sevens = nl.full((2, 3), 7, dtype, buffer=buffer)
        assert {t.buffer for t in (zeros, ones, sevens)} == {buffer}
        return zeros, ones, sevens, nl.zeros_like(ones), nl.zeros_like(ones, dtype=nl.int32)

    found = values(kernel)
    for got, value in zip(found, (0, 1, 7, 0), strict=False):
        same(got, np.full((2, 3), value, HOSTS[dtype]))
    same(found[-1], np.zeros((2, 3), np.int32))


@pytest.mark.parametrize("shape", [(20, 3), (5,), (3, 7, 2)])
def test_hbm_of_any_size_is_filled_block_by_block(shape):
    same(values(lambda: nl.full(shape, 2.5, nl.float32, buffer=HBM)), np.full(shape, 2.5, F32))


def test_empty_like_keeps_shape_dtype_and_buffer():
    def kernel():
        t = nl.ndarray((2, 3), nl.bfloat16, buffer=PSUM)
        a, b = nl.empty_like(t), nl.empty_like(t, dtype=nl.float32, buffer=SBUF, name="other")
        assert (a.shape, a.dtype, a.buffer) == ((2, 3), nl.bfloat16, PSUM)
        assert (b.dtype, b.buffer, b.name) == (nl.float32, SBUF, "other")

    traced(kernel)


@pytest.mark.parametrize("dtype", [nl.uint8, nl.float32, nl.bfloat16])
@pytest.mark.parametrize("n", [1, 5, 8])
def test_the_identity(n, dtype):
    def kernel():
        given = sb(n, n, dtype=dtype)
        assert nl.shared_identity_matrix(n, dst=given) is given
        return nl.shared_identity_matrix(n, dtype), given

    for got in values(kernel):
        same(got, np.eye(n).astype(HOSTS[dtype]))


@pytest.mark.parametrize("n", [0, 9])
def test_the_identity_has_one_row_a_partition(n):
    refused(lambda: nl.shared_identity_matrix(n), f"n={n}", "1 to 8", error=ShapeError)


def test_device_print_shows_prefix_and_values(capsys):
    def kernel():
        t = sb(1, 2, dtype=nl.int32)
        nisa.memset(t, 41)
        nl.device_print("here:", t)

    traced(kernel)
    shown = capsys.readouterr().out
    assert shown.startswith("here:")
    assert "[[41 41]]" in shown


def test_ranges_are_pythons():
    for name in ("affine_range", "sequential_range", "static_range"):
        function = getattr(nl, name)
        assert list(function(3)) == [0, 1, 2]
        assert list(function(2, 8, 3)) == [2, 5]


def test_the_launch_grid():
    seen = []

    def kernel():
        seen.append((nl.program_id(0), nl.num_programs(0), nl.program_ndim()))

    launch(kernel, target="trn2")
    launch(kernel, target="trn2", lnc=2)
    assert seen == [(0, 1, 0), (0, 2, 0), (1, 2, 0)]
    refused(lambda: nl.program_id(1), "axis 1", "one axis, 0", error=KernelError)


def test_dynamic_slices():
    same(values(lambda x: tile(x)[nl.ds(0, 1), nl.ds(1, 2)], A), A[0:1, 1:3])


@pytest.mark.parametrize("name", ["bypass", "average", "prelu"])
def test_tokens_are_no_functions(name):
    token = getattr(nl, name)
    assert not callable(token)
    assert repr(token) == f"nl.{name}"


@pytest.mark.parametrize("call", [
    lambda: nl.ndarray((1, 1), nl.float32), lambda: nisa.iota(None, [[1, 1]]),
    nisa.register_alloc, nl.program_id,
    lambda: nl.fori_loop(0, 1, lambda i: None), lambda: nl.zeros((1, 1), nl.float32),
])  # fmt: skip
def test_calls_outside_a_kernel_say_so(call):
    with pytest.raises(KernelError, match="outside a kernel: NKI calls need a running kernel"):
        call()


@pytest.mark.parametrize(("target", "bytes_"), [("trn1", 192 * 1024), ("trn2", 224 * 1024),
                                                ("trn3", 256 * 1024)])  # fmt: skip
def test_outside_a_kernel_sizes_are_those_of_the_environments_target(monkeypatch, target, bytes_):
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", target)
    assert nl.tile_size.pmax == 128
    assert nl.tile_size.sbuf_size_bytes == 128 * bytes_
