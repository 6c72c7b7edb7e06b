"""The wheel, built, installed and used away from the clone."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.child import REPO, run_python
from tests.repo.test_readme import block

DATA = {".css", ".csv", ".html", ".js", ".json", ".typed"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the build backend itself: no network, no isolation."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel with pip, alone, into an empty directory."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    command += ["--no-compile", "--target", str(target), str(wheel)]
    done = subprocess.run(command, cwd=target, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nki_kernels"}
    library = REPO / "nki_kernels"
    expected = {
        path.relative_to(REPO).as_posix()
        for path in library.rglob("*")
        if path.suffix in DATA | {".py"}
    }
    assert "nki_kernels/embedded/nki/__init__.py" in expected
    assert "nki_kernels/py.typed" in expected
    assert expected <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_away_from_the_clone(installed: Path, tmp_path: Path) -> None:
    # -S: no site-packages processing, so an editable install cannot put the clone on the path.
    site = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    code = (
        "import json, nki_kernels, nki, nki.language, nki.isa, importlib.util as util\n"
        "rooms = [n for n in ('reference', 'tests', 'bench') if util.find_spec(n)]\n"
        "print(json.dumps([nki_kernels.__file__, nki.__file__, rooms]))\n"
    )
    path = [installed, *site]
    done = run_python(["-S", "-c", code], cwd=tmp_path, path=path)
    assert done.returncode == 0, done.stderr
    package, nki, rooms = json.loads(done.stdout)
    assert package == str(installed / "nki_kernels" / "__init__.py")
    assert nki == str(installed / "nki_kernels" / "embedded" / "nki" / "__init__.py")
    assert rooms == []
    (tmp_path / "first.py").write_text(block("python: first kernel"), encoding="utf-8")
    done = run_python(["-S", "first.py"], cwd=tmp_path, path=path)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
