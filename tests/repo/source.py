"""The files of the repository, for the tests that read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
ROOMS = ("nki_kernels", "reference", "bench", "tests")
EMBEDDED = "nki_kernels/embedded/"
_TEXT = {".py", ".md", ".toml", ".json", ".csv", ".txt", ".cfg", ".ini", ".yml", ".yaml", ".typed"}


def python_files() -> Iterator[tuple[str, str]]:
    """Yield (path relative to the repository, text) of every Python file of ours."""
    for room in ROOMS:
        for path in sorted((REPO / room).rglob("*.py")):
            yield path.relative_to(REPO).as_posix(), path.read_text(encoding="utf-8")


def text_files() -> Iterator[tuple[str, str]]:
    """Yield (path relative to the repository, text) of every text file of ours."""
    top = [path for path in REPO.iterdir() if path.is_file() and path.suffix in _TEXT]
    below = [path for room in ROOMS for path in (REPO / room).rglob("*") if path.suffix in _TEXT]
    scripts = [path for path in (REPO / ".ci").rglob("*") if path.is_file()]
    for path in sorted(top + below + scripts):
        yield path.relative_to(REPO).as_posix(), path.read_text(encoding="utf-8")
