"""Which nki is in force, for every package that can answer to that name.

The packages are made up in a temporary directory; a child Python finds them on its path.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nki_kernels import toolchain
from nki_kernels.machine.errors import ToolchainError
from tests.child import REPO, run_python

REPORT = """
import dataclasses, json, sys
import nki_kernels
tool = nki_kernels.toolchain.current()
import nki, nki.language, nki.isa
print(json.dumps({
    "kind": tool.kind, "version": tool.version, "path": str(tool.path), "reason": tool.reason,
    "nki": nki.__file__, "entries": sys.path.count(str(nki_kernels.toolchain.embedded_path())),
}))
"""
REAL = {"__init__.py": "", "language/__init__.py": "", "isa.py": ""}
PLACEHOLDER = {"__init__.py": 'raise ImportError("WRONG PACKAGE")'}
EMBEDDED = toolchain.embedded_path() / "nki"


def make_nki(site: Path, files: dict[str, str], version: str | None) -> Path:
    """Write a package nki, and its metadata unless ``version`` is None; return ``site``."""
    for name, text in files.items():
        file = site / "nki" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    if version is not None:
        info = site / f"nki-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nki\nVersion: {version}\n")
    return site


def child(
    tmp_path: Path, *, choice: str | None = None, code: str = REPORT, real_first: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` where ``tmp_path/site`` may hold another nki."""
    site = tmp_path / "site"
    path = [site, REPO] if real_first else [REPO, site]
    env = {} if choice is None else {toolchain.ENV: choice}
    return run_python(["-c", code], cwd=tmp_path, path=path, env=env)


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """The message of the ToolchainError that ended the child."""
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    prefix = "nki_kernels.machine.errors.ToolchainError: toolchain: "
    assert last.startswith(prefix), done.stderr
    return last.removeprefix(prefix)


def real_is_installed() -> bool:
    try:
        importlib.metadata.version("nki")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def is_embedded(facts: dict[str, Any]) -> bool:
    return (facts["kind"], facts["path"], facts["nki"]) == (
        "embedded",
        str(EMBEDDED),
        str(EMBEDDED / "__init__.py"),
    )


@pytest.mark.skipif(real_is_installed(), reason="an nki is installed in this environment")
@pytest.mark.parametrize("choice", [None, "", "auto", "embedded"])
def test_embedded_when_nothing_else_is_there(tmp_path: Path, choice: str | None) -> None:
    facts = report(child(tmp_path, choice=choice))
    assert is_embedded(facts)
    expected = f"{toolchain.ENV}=embedded" if choice == "embedded" else "no other nki is installed"
    assert facts["reason"] == expected
    assert facts["entries"] == 1


@pytest.mark.parametrize("choice", [None, "real"])
@pytest.mark.parametrize("version", ["0.3.0", "0.6.0", "0.7.0+gen3", "1.0"])
def test_a_real_package_wins(tmp_path: Path, choice: str | None, version: str) -> None:
    site = make_nki(tmp_path / "site", REAL, version)
    facts = report(child(tmp_path, choice=choice))
    assert (facts["kind"], facts["version"]) == ("real", version)
    assert facts["path"] == str(site / "nki")
    assert facts["nki"] == str(site / "nki" / "__init__.py")


def test_a_real_package_wins_over_an_embedded_path_that_stands_first(tmp_path: Path) -> None:
    make_nki(tmp_path / "site", REAL, "0.6.0")
    path = [toolchain.embedded_path(), REPO, tmp_path / "site"]
    facts = report(run_python(["-c", REPORT], cwd=tmp_path, path=path))
    assert (facts["kind"], facts["entries"]) == ("real", 0)
    assert facts["nki"] == str(tmp_path / "site" / "nki" / "__init__.py")


def test_a_source_checkout_of_the_real_package_tells_its_version(tmp_path: Path) -> None:
    make_nki(tmp_path / "site", REAL | {"__init__.py": '__version__ = "0.6.0.dev1"'}, None)
    facts = report(child(tmp_path))
    assert (facts["kind"], facts["version"]) == ("real", "0.6.0.dev1")


def test_an_editable_install_is_real_though_its_metadata_stand_elsewhere(tmp_path: Path) -> None:
    make_nki(tmp_path / "site", REAL, None)
    make_nki(tmp_path / "other", {}, "0.6.0")
    url = '{"url": "file:///x", "dir_info": {"editable": true}}'
    (tmp_path / "other" / "nki-0.6.0.dist-info" / "direct_url.json").write_text(url)
    path = [tmp_path / "site", tmp_path / "other", REPO]
    facts = report(run_python(["-c", REPORT], cwd=tmp_path, path=path))
    assert (facts["kind"], facts["version"]) == ("real", "0.6.0")


def test_embedded_on_request_goes_before_a_real_package(tmp_path: Path) -> None:
    make_nki(tmp_path / "site", REAL, "0.6.0")
    facts = report(child(tmp_path, choice="embedded"))
    assert is_embedded(facts)
    assert facts["entries"] == 1


@pytest.mark.parametrize("choice", [None, "embedded"])
@pytest.mark.parametrize("version", ["0.0.1", "0.1"])
def test_a_placeholder_is_passed_over_without_importing_it(
    tmp_path: Path, choice: str | None, version: str
) -> None:
    make_nki(tmp_path / "site", PLACEHOLDER, version)
    facts = report(child(tmp_path, choice=choice))
    assert is_embedded(facts)
    if choice is None:
        place = tmp_path / "site" / "nki"
        assert facts["reason"] == f"the nki {version} in {place} is a placeholder"


def test_the_remains_of_a_placeholder_are_nothing(tmp_path: Path) -> None:
    make_nki(tmp_path / "site", {}, "0.0.1")
    assert is_embedded(report(child(tmp_path)))


def test_a_folder_called_nki_is_nothing(tmp_path: Path) -> None:
    # The root of a checkout of AWS's documentation has one; it is no package.
    (tmp_path / "site" / "nki" / "examples").mkdir(parents=True)
    facts = report(child(tmp_path))
    assert is_embedded(facts)


@pytest.mark.parametrize("choice", [None, "real"])
@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise OSError('libnki.so: not found')", "OSError: libnki.so: not found"),
        ("raise RuntimeError('no driver')", "RuntimeError: no driver"),
        ("import sys; sys.no_such_hook", "AttributeError: module 'sys' has no attribute"),
    ],
)
@pytest.mark.parametrize("file", ["__init__.py", "isa.py"])
def test_a_broken_real_package_raises(
    tmp_path: Path, choice: str | None, statement: str, says: str, file: str
) -> None:
    make_nki(tmp_path / "site", REAL | {file: statement}, "0.6.0")
    text = failure(child(tmp_path, choice=choice))
    place = tmp_path / "site" / "nki"
    assert text.startswith(f"the nki 0.6.0 in {place} is AWS's package and fails to import: {says}")
    assert "; allowed: an nki that imports; " in text
    assert "NKI_KERNELS_TOOLCHAIN=embedded" in text


BAD = {
    "incomplete": (
        {"__init__.py": "", "isa.py": ""},
        "0.6.0",
        "the nki 0.6.0 in {place} is broken (no nki.language)",
    ),
    "files gone": ({}, "0.6.0", "the nki 0.6.0 that pip lists is broken (its files are gone)"),
    "too old": (REAL, "0.2.0", "the nki 0.2.0 in {place} is older than 0.3"),
    "unrelated": (
        {"__init__.py": ""},
        None,
        "{place} is called nki but is not NKI (no nki.language and no nki.isa)",
    ),
}


@pytest.mark.parametrize("choice", [None, "real"])
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_raises(tmp_path: Path, case: str, choice: str | None) -> None:
    files, version, says = BAD[case]
    make_nki(tmp_path / "site", files, version)
    text = failure(child(tmp_path, choice=choice))
    assert says.format(place=tmp_path / "site" / "nki") in text
    assert "; allowed: " in text
    if choice is None:
        assert "set NKI_KERNELS_TOOLCHAIN=embedded" in text
    # Asked for by name, the embedded one is not disturbed by any of them.
    assert is_embedded(report(child(tmp_path, choice="embedded")))


def test_a_module_file_called_nki_is_unrelated(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "nki.py").write_text("")
    text = failure(child(tmp_path))
    assert text.startswith(f"{tmp_path / 'site' / 'nki.py'} is called nki but is not NKI")
    assert "rename it or take it off sys.path" in text


@pytest.mark.parametrize(
    ("files", "version", "says"),
    [
        (None, None, "no nki is installed"),
        (PLACEHOLDER, "0.0.1", "the nki 0.0.1 in {place} is the public index's placeholder"),
    ],
)
def test_real_on_request_never_falls_back(
    tmp_path: Path, files: dict[str, str] | None, version: str | None, says: str
) -> None:
    if files is None and real_is_installed():
        pytest.skip("an nki is installed in this environment")
    if files is not None:
        make_nki(tmp_path / "site", files, version)
    text = failure(child(tmp_path, choice="real"))
    expected = says.format(place=tmp_path / "site" / "nki")
    assert text.startswith(f"NKI_KERNELS_TOOLCHAIN=real, but {expected}; allowed: AWS's nki")


@pytest.mark.parametrize("choice", ["Real", "simulator", "1"])
def test_an_unknown_choice_raises(tmp_path: Path, choice: str) -> None:
    text = failure(child(tmp_path, choice=choice))
    assert text == (
        f"NKI_KERNELS_TOOLCHAIN is {choice!r}; allowed: auto, real, embedded; "
        "set one of these or unset it"
    )


# --- nki imported before nki_kernels -------------------------------------------------------------


def test_the_embedded_nki_imported_first_is_kept(tmp_path: Path) -> None:
    path = [toolchain.embedded_path(), REPO]
    facts = report(run_python(["-c", "import nki" + REPORT], cwd=tmp_path, path=path))
    assert is_embedded(facts)
    # Importing the embedded nki imports nki_kernels, which adopts it.
    assert facts["reason"] == "it was already imported"


def test_the_embedded_nki_imported_first_is_not_real(tmp_path: Path) -> None:
    path = [toolchain.embedded_path(), REPO]
    done = run_python(
        ["-c", "import nki, nki_kernels"],
        cwd=tmp_path,
        path=path,
        env={toolchain.ENV: "real"},
    )
    text = failure(done)
    assert text.startswith(
        f"NKI_KERNELS_TOOLCHAIN=real, but the embedded nki in {EMBEDDED} is already imported"
    )


def test_a_real_nki_imported_first_is_kept(tmp_path: Path) -> None:
    make_nki(tmp_path / "site", REAL, "0.6.0")
    facts = report(child(tmp_path, code="import nki" + REPORT))
    assert (facts["kind"], facts["reason"]) == ("real", "it was already imported")


def test_a_real_nki_imported_first_is_not_embedded(tmp_path: Path) -> None:
    site = make_nki(tmp_path / "site", REAL, "0.6.0")
    text = failure(child(tmp_path, choice="embedded", code="import nki, nki_kernels"))
    assert text.startswith(
        f"NKI_KERNELS_TOOLCHAIN=embedded, but the nki in {site / 'nki'} is already imported"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import nki, nki_kernels",
        "import sys, types; sys.modules['nki'] = types.ModuleType('nki'); import nki_kernels",
    ],
)
def test_an_unrelated_nki_imported_first_raises(tmp_path: Path, code: str) -> None:
    make_nki(tmp_path / "site", {"__init__.py": ""}, None)
    text = failure(child(tmp_path, code=code))
    assert "is called nki but is not NKI" in text
    assert "and it is already imported" in text


# --- in this process -----------------------------------------------------------------------------


def test_the_decision_is_made_once() -> None:
    assert toolchain.activate() is toolchain.current()
    assert toolchain.current() is toolchain.activate()


def test_an_installation_without_the_embedded_package_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(toolchain, "embedded_path", lambda: tmp_path)
    with pytest.raises(ToolchainError, match=r"the embedded nki is missing: no __init__\.py in"):
        toolchain._embedded("test")


def test_importing_the_package_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "torch.py").write_text("raise RuntimeError('torch was imported')")
    code = "import nki_kernels, sys; print('torch' in sys.modules)"
    done = child(tmp_path, code=code, choice="embedded")
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
