"""A name that is missing says whether NKI has it, had it, or never had it."""

from __future__ import annotations

import importlib

import nki
import nki._absent as table
import nki.isa as nisa
import nki.language as nl
import pytest


@pytest.mark.parametrize("module", [nki, nl, nisa])
def test_the_tables_name_only_what_is_missing(module):
    names = {**table.REMOVED[module.__name__], **table.NOT_HERE[module.__name__]}
    for name, remedy in names.items():
        with pytest.raises(AttributeError) as caught:
            getattr(module, name)
        assert remedy in str(caught.value)
        assert caught.value.name == name


@pytest.mark.parametrize(("module", "name", "says"), [
    (nl, "par_dim", "nl.par_dim: NKI removed this name; dimension 0 of a tile is the partition"),
    (nl, "int64", "nl.int64: NKI has this name, the embedded NKI does not; registers and"),
    (nl, "alloc_tiles", "nl.alloc_tiles: NKI has this name, the embedded NKI does not; allocate"),
    (nl, "softmaxx", "nl.softmaxx: NKI 0.6 has no such name; close to it are softmax"),
    (nl, "qqqq", "nl.qqqq: NKI 0.6 has no such name"),
    (nki, "compiler", "nki.compiler: NKI has this name, the embedded NKI does not; its options"),
    (nisa, "tensor_tensors", "close to it are tensor_tensor"),
    (nki, "benchmark", "nki.benchmark: NKI removed this name; use nki_kernels.profile(kernel"),
])  # fmt: skip
def test_messages(module, name, says):
    with pytest.raises(AttributeError) as caught:
        getattr(module, name)
    assert says in str(caught.value)


def test_a_missing_name_is_no_attribute():
    assert not hasattr(nl, "par_dim")
    assert getattr(nki, "compiler", None) is None


def test_imports_by_name_fail_as_python_does():
    with pytest.raises(ImportError, match="cannot import name 'par_dim'"):
        exec("from nki.language import par_dim")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nki.no_such_module")
