"""Which ``nki`` package is in force: AWS's own or the embedded one. Only this file decides.

Four things can answer to ``import nki``:

* the embedded package in ``nki_kernels/embedded`` (runs on any CPU);
* AWS's real package (version 0.3 or newer, with ``nki.language`` and ``nki.isa``);
* the placeholder that the public package index serves under that name, which raises on import;
* something unrelated: a user's own ``nki.py`` or directory ``nki``.

A real package wins. A placeholder is passed over. Everything else is an error that says what was
found and what to do; in particular a real but broken package is never replaced silently, because a
result would then come from another program than the one the user installed.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

from nki_kernels._version import __version__
from nki_kernels.machine.errors import ToolchainError

ENV = "NKI_KERNELS_TOOLCHAIN"
CHOICES = ("auto", "real", "embedded")
# The first release with the API the kernels are written in; older ones differ in every call.
OLDEST_REAL = (0, 3)
_NEEDED = ("language", "isa")
_INSTALL = (
    "pip install 'nki>=0.6,<0.8' --extra-index-url https://pip.repos.neuron.amazonaws.com "
    "(Python 3.12 or newer)"
)
_USE_EMBEDDED = f"set {ENV}=embedded to use the CPU implementation of this package"


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """The ``nki`` in force.

    Attributes:
        kind: "real" (AWS's package) or "embedded" (the CPU implementation shipped here).
        version: version of the distribution that provides it.
        path: directory of the package.
        reason: why this one, in words.
    """

    kind: Literal["real", "embedded"]
    version: str
    path: Path
    reason: str


@dataclasses.dataclass(frozen=True)
class _Found:
    """What ``import nki`` would give without the embedded package; found without importing it."""

    what: Literal["nothing", "placeholder", "real", "too old", "incomplete", "unrelated"]
    path: Path | None = None
    version: str = "unknown"
    detail: str = ""


_current: Toolchain | None = None


def embedded_path() -> Path:
    """Return the directory that holds the embedded package ``nki``; it goes on ``sys.path``."""
    return Path(__file__).resolve().parent / "embedded"


def current() -> Toolchain:
    """Return the toolchain in force, deciding now if ``activate`` has not run yet."""
    return activate() if _current is None else _current


def activate() -> Toolchain:
    """Decide which ``nki`` is in force and make ``import nki`` give it.

    The decision is made once per process; later calls return it. The environment variable
    ``NKI_KERNELS_TOOLCHAIN`` may force it: "auto" (default), "real" or "embedded".

    Returns:
        The toolchain in force.

    Raises:
        ToolchainError: the variable has another value; the package asked for is missing; a real
            package is broken, incomplete or too old; something unrelated is called ``nki``.
    """
    global _current  # noqa: PLW0603  one decision per process, made here
    if _current is None:
        choice = os.environ.get(ENV) or "auto"
        if choice not in CHOICES:
            raise ToolchainError(
                f"toolchain: {ENV} is {choice!r}; allowed: {', '.join(CHOICES)}; "
                f"set one of these or unset it"
            )
        loaded = sys.modules.get("nki")
        _current = _decide(choice) if loaded is None else _adopt(loaded, choice)
    return _current


def _decide(choice: str) -> Toolchain:
    """Decide while no ``nki`` is loaded, and arrange ``sys.path``."""
    if choice == "embedded":
        _put_embedded(first=True)
        return _embedded(f"{ENV}=embedded")
    found = _look()
    if found.what == "real":
        return _import_real(found, f"{ENV}=real" if choice == "real" else "it is installed")
    if choice == "real":
        raise ToolchainError(_no_real(found))
    if found.what == "nothing":
        _put_embedded(first=False)
        return _embedded("no other nki is installed")
    if found.what == "placeholder":
        _put_embedded(first=True)
        return _embedded(f"the nki {found.version} in {found.path} is a placeholder")
    raise ToolchainError(
        f"toolchain: {_describe(found)}; allowed: a complete nki of version "
        f"{_dotted(OLDEST_REAL)} or newer, or none; {_advice(found)}, or {_USE_EMBEDDED}"
    )


def _adopt(loaded: ModuleType, choice: str) -> Toolchain:
    """Decide when ``nki`` was imported before ``nki_kernels``: it cannot be exchanged any more."""
    where = _location(getattr(loaded, "__spec__", None), getattr(loaded, "__file__", None))
    if where is not None and where.parent == embedded_path():
        if choice == "real":
            raise ToolchainError(
                f"toolchain: {ENV}=real, but the embedded nki in {where} is already imported; "
                f"allowed: one nki per process; import nki_kernels before nki in a new process"
            )
        return _embedded("it was already imported")
    if choice == "embedded":
        raise ToolchainError(
            f"toolchain: {ENV}=embedded, but the nki in {where} is already imported; "
            f"allowed: one nki per process; import nki_kernels before nki in a new process"
        )
    found = _Found("unrelated", detail="no file") if where is None else _classify(where)
    if found.what != "real":
        raise ToolchainError(
            f"toolchain: {_describe(found)}, and it is already imported; allowed: a complete nki "
            f"of version {_dotted(OLDEST_REAL)} or newer, or the embedded one; "
            f"{_advice(found)}, or import nki_kernels before nki"
        )
    return _import_real(found, "it was already imported")


def _embedded(reason: str) -> Toolchain:
    """Return the embedded toolchain, having made sure that it is there and found first."""
    package = embedded_path() / "nki"
    if not (package / "__init__.py").is_file():
        raise ToolchainError(
            f"toolchain: the embedded nki is missing: no __init__.py in {package}; allowed: a "
            f"complete installation; reinstall nki-kernels"
        )
    importlib.invalidate_caches()
    where = _location(importlib.util.find_spec("nki"), None)
    if where != package:
        raise ToolchainError(
            f"toolchain: import nki gives {where}, not the embedded package {package}; allowed: "
            f"no import hook that answers for nki; remove the hook (an editable install of "
            f"another nki?)"
        )
    return Toolchain("embedded", __version__, package, reason)


def _put_embedded(*, first: bool) -> None:
    """Put the embedded directory on ``sys.path``: first, or last so that others may win."""
    _take_embedded_off()
    sys.path.insert(0 if first else len(sys.path), str(embedded_path()))


def _take_embedded_off() -> None:
    """Take the embedded directory off ``sys.path``, where a PYTHONPATH may have put it."""
    entry = str(embedded_path())
    sys.path[:] = [p for p in sys.path if p != entry]


def _import_real(found: _Found, reason: str) -> Toolchain:
    """Import the real package once, so that a broken one is known now and not in a kernel."""
    try:
        module = importlib.import_module("nki")
        for name in _NEEDED:
            importlib.import_module(f"nki.{name}")
    except (ImportError, OSError, AttributeError, RuntimeError, TypeError, ValueError) as err:
        raise ToolchainError(
            f"toolchain: {_describe(found)} and fails to import: {type(err).__name__}: {err}; "
            f"allowed: an nki that imports; repair it ({_INSTALL}), or {_USE_EMBEDDED}"
        ) from err
    version = found.version
    if version == "unknown":
        version = str(getattr(module, "__version__", "unknown"))
    return Toolchain("real", version, Path(module.__path__[0]).resolve(), reason)


def _look() -> _Found:
    """Say what ``import nki`` gives when the embedded directory is not on ``sys.path``."""
    _take_embedded_off()
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("nki")
    # A directory without __init__.py (a checkout's folder "nki", say) is a namespace package:
    # any regular package of that name goes before it, wherever it stands on sys.path.
    where = _location(spec, None)
    installed = _distribution()
    if where is None and installed is None:
        return _Found("nothing")
    return _classify(where)


def _classify(where: Path | None) -> _Found:
    """Classify the package in directory ``where`` (None: only its metadata was found)."""
    dist = _distribution()
    if dist is not None and where is not None and not _provides(dist, where):
        dist = None
    version = "unknown" if dist is None else dist.version
    missing = _missing_modules(where)
    number = _release(version)
    if where is None:
        # Metadata with no package behind it: a half-removed install of the placeholder is
        # nothing to anyone; one of the real package is broken.
        kind: Literal["nothing", "incomplete"] = "nothing" if number < OLDEST_REAL else "incomplete"
        return _Found(kind, None, version, "its files are gone")
    if dist is None:
        # No metadata: a source checkout on the path, or somebody's own package.
        if missing:
            return _Found("unrelated", where, version, f"no {' and no '.join(missing)}")
        return _Found("real", where)
    if not missing:
        return _Found("real" if number >= OLDEST_REAL else "too old", where, version)
    detail = f"no {' and no '.join(missing)}"
    return _Found("placeholder" if number < OLDEST_REAL else "incomplete", where, version, detail)


def _missing_modules(where: Path | None) -> list[str]:
    """Names of the needed submodules that the package in ``where`` has no file for."""
    suffixes = importlib.machinery.all_suffixes()
    missing = []
    for name in _NEEDED:
        files = [f"{name}{suffix}" for suffix in suffixes] + [f"{name}/__init__.py"]
        if where is None or not any((where / file).is_file() for file in files):
            missing.append(f"nki.{name}")
    return missing


def _distribution() -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution("nki")
    except importlib.metadata.PackageNotFoundError:
        return None


def _provides(dist: importlib.metadata.Distribution, where: Path) -> bool:
    """True if the package in ``where`` comes from ``dist`` (or ``dist`` is an editable install)."""
    home = Path(str(dist.locate_file(""))).resolve()
    if where.parent == home:
        return True
    # An editable install keeps its metadata in site-packages and its code elsewhere.
    return (dist.read_text("direct_url.json") or "").find('"editable"') >= 0


def _location(spec: importlib.machinery.ModuleSpec | None, file: str | None) -> Path | None:
    """Directory of a regular package, or the file of a plain module; None for a namespace."""
    origin = file if spec is None or spec.origin is None else spec.origin
    if origin is None:
        return None
    path = Path(origin).resolve()
    return path.parent if path.name.startswith("__init__.") else path


def _release(version: str) -> tuple[int, int]:
    """Leading two numbers of a version; (0, 0) when it has none."""
    match = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (0, 0) if match is None else (int(match[1]), int(match[2] or 0))


def _dotted(number: Sequence[int]) -> str:
    return ".".join(str(part) for part in number)


def _describe(found: _Found) -> str:
    """Say what was found, with its place and version."""
    if found.what == "nothing":
        return "no nki is installed"
    place = "that pip lists" if found.path is None else f"in {found.path}"
    name = f"the nki {found.version} {place}"
    return {
        "placeholder": f"{name} is the public index's placeholder",
        "real": f"{name} is AWS's package",
        "too old": f"{name} is older than {_dotted(OLDEST_REAL)}",
        "incomplete": f"{name} is broken ({found.detail})",
        "unrelated": f"{found.path or 'a module'} is called nki but is not NKI ({found.detail})",
    }[found.what]


def _advice(found: _Found) -> str:
    """Say what to do about a find that cannot be used."""
    if found.what == "unrelated":
        return "rename it or take it off sys.path"
    return f"repair it: {_INSTALL}"


def _no_real(found: _Found) -> str:
    return (
        f"toolchain: {ENV}=real, but {_describe(found)}; allowed: AWS's nki of version "
        f"{_dotted(OLDEST_REAL)} or newer; {_INSTALL}, or unset {ENV}"
    )
