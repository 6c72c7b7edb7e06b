"""Names, parameters, order and defaults equal the published ones (tests/data/nki_api_0.6.json)."""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import nki
import nki.isa as nisa
import nki.language as nl
import pytest

from nki_kernels.machine import dtypes
from nki_kernels.machine.launch import launch
from nki_kernels.machine.operators import operator

DATA = Path(__file__).parents[1] / "data" / "nki_api_0.6.json"
API = json.loads(DATA.read_text(encoding="utf-8"))["modules"]
#: Published names that do not exist here yet. Whoever adds one takes it off.
MISSING: dict[str, set[str]] = {}
#: Parameters of NKI 0.7 that follow the published ones of 0.6.
APPENDED: dict[str, list[str]] = {
    "nki.language.empty_like": ["transpose_axes", "address"],
    "nki.isa.activation": ["engine"],
    "nki.isa.activate2": ["engine"],
}


def module(name: str) -> Any:
    """The module of that name, or None while there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


MODULES = {name: found for name in API if (found := module(name)) is not None}
FUNCTIONS = [
    pytest.param(found, name, id=f"{home}.{name}")
    for home, found in MODULES.items()
    for name, entry in API[home].items()
    if entry["kind"] == "function" and hasattr(found, name)
]
#: What the first instruction set must hold; everything else is compared as soon as it exists.
FIRST = (
    "nc_matmul", "nc_transpose", "tensor_copy", "memset", "tensor_tensor", "tensor_scalar",
    "activation", "iota", "dma_copy", "dma_transpose", "register_alloc", "register_load",
    "register_move", "register_store", "get_nc_version", "get_nc_sub_version",
)  # fmt: skip


def evaluated(text: str) -> Any:
    """The value a published default such as "engine.unknown" or "1.0" stands for here."""
    try:
        return ast.literal_eval(text)
    except ValueError:
        head, _, member = text.partition(".")
        home = nisa if hasattr(nisa, head) else nl
        found = getattr(home, head)
        return getattr(found, member) if member else found


def parameters(function: Any) -> list[inspect.Parameter]:
    """Parameters as a caller sees them; `ndarray` is a class, a math function an object."""
    if inspect.isclass(function):
        return list(inspect.signature(function.__new__).parameters.values())[1:]
    return list(inspect.signature(function).parameters.values())


def spelled(parameter: inspect.Parameter) -> str:
    """The name as the published list writes it."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return stars.get(parameter.kind, "") + parameter.name


@pytest.mark.parametrize("name", FIRST)
def test_the_first_instruction_set_exists(name):
    assert callable(getattr(nisa, name))


@pytest.mark.parametrize("name", API)
def test_what_is_missing_is_listed(name):
    found = module(name)
    missing = {n for n in API[name] if found is None or not hasattr(found, n)}
    assert missing == MISSING.get(name, set())


@pytest.mark.parametrize(("home", "name"), FUNCTIONS)
def test_parameters_and_defaults_are_the_published_ones(home, name):
    published = API[home.__name__][name]["params"]
    found = parameters(getattr(home, name))
    assert [spelled(p) for p in found[: len(published)]] == [p for p, _ in published]
    added = [spelled(p) for p in found[len(published) :]]
    assert added == APPENDED.get(f"{home.__name__}.{name}", [])
    assert all(p.default is not inspect.Parameter.empty for p in found[len(published) :])
    for parameter, (_, default) in zip(found, published, strict=False):
        if default is None:
            assert parameter.default is inspect.Parameter.empty, parameter.name
        elif default == "...":
            assert parameter.default is not inspect.Parameter.empty, parameter.name
        else:
            want = evaluated(default)
            if hasattr(want, "nki_op"):  # an operator: the table's entry or nl's function of it
                assert operator(parameter.default) is operator(want), parameter.name
                continue
            assert parameter.default == want, parameter.name
            assert type(parameter.default) is type(want), parameter.name


VIEWS = API["nki.language"]["NkiTensor"]["members"]


@pytest.mark.parametrize("name", [n for n in VIEWS if n != "__init__"])
def test_a_tensor_has_the_published_members(name):
    """All but the constructor: tiles are made by ndarray."""
    member = getattr(nl.NkiTensor, name)
    published = VIEWS[name].get("params", [])
    if published:
        assert list(inspect.signature(member).parameters) == [p for p, _ in published]


def test_a_missing_argument_is_pythons_own_error():
    with pytest.raises(TypeError, match="required positional argument: 'src'"):
        launch(lambda: nisa.tensor_copy(dst=None), target="toy")


def members(kind: type[enum.Enum]) -> dict[str, Any]:
    return {name: member.value for name, member in kind.__members__.items()}


ENUMS = [n for n, entry in API["nki.isa"].items() if entry.get("bases") == ["Enum"]]


@pytest.mark.parametrize("name", ENUMS)
def test_enumerations_have_the_published_members_and_values(name):
    published = API["nki.isa"][name]["members"]
    want = {n: ast.literal_eval(m["value"]) for n, m in published.items()}
    assert members(getattr(nisa, name)) == want


@pytest.mark.parametrize(
    "name", [n for n, e in API["nki.isa"].items() if e.get("type") == "engine"]
)
def test_engine_aliases(name):
    assert getattr(nisa, name) is nisa.engine[name.removesuffix("_engine")]


@pytest.mark.parametrize(
    "name", [n for n, e in API["nki.language"].items() if e.get("type") == "DType"]
)
def test_dtypes_are_strings_by_their_published_names(name):
    found = getattr(nl, name)
    assert isinstance(found, nl.DType)
    assert isinstance(found, str)
    assert str(found) == name
    assert dtypes.as_dtype(name) is found


def test_memory_regions():
    assert nl.hbm is nl.private_hbm
    published = API["nki.language"]["MemoryRegion"]["members"]
    want = {name: ast.literal_eval(member["value"]) for name, member in published.items()}
    assert members(nl.MemoryRegion) == want
    regions = (nl.sbuf, nl.psum, nl.private_hbm, nl.shared_hbm)
    assert [nl.is_sbuf(r) for r in regions] == [True, False, False, False]
    assert [nl.is_psum(r) for r in regions] == [False, True, False, False]
    assert [nl.is_on_chip(r) for r in regions] == [True, True, False, False]
    assert [nl.is_hbm(r) for r in regions] == [False, False, True, True]


def test_generations_compare_in_order():
    gen = nisa.nc_version
    assert gen.gen2 < gen.gen3 < gen.gen4
    assert gen.gen3 >= 3


def test_the_error_is_the_documented_class():
    assert issubclass(nisa.NkiValidationError, AssertionError)


def test_the_package_exports_its_parts():
    for name in API["nki"]:
        assert callable(getattr(nki, name))
    for home in (*MODULES.values(), nki.typing):
        assert [n for n in home.__all__ if not hasattr(home, n)] == []


def test_every_public_tile_size_has_its_published_name():
    published = [n for n in API["nki.language"]["_TileSize"]["members"] if not n.startswith("_")]
    seen: dict[str, int] = {}

    def kernel():
        seen.update({n: getattr(nl.tile_size, n) for n in published})

    launch(kernel, target="trn2")
    documented = {
        "pmax": 128, "psum_fmax": 512, "psum_bank_fmax": 512, "psum_bank_fmax_bytes": 2048,
        "psum_num_banks": 8, "gemm_stationary_fmax": 128, "gemm_moving_fmax": 512,
        "bn_stats_fmax": 512,
    }  # fmt: skip
    assert {name: seen[name] for name in documented} == documented
    assert seen["total_available_sbuf_size"] == seen["sbuf_fmax_bytes"] == 4 * seen["sbuf_fmax"]
    assert seen["sbuf_fmax_bytes"] <= seen["sbuf_size_bytes"] // seen["pmax"]
