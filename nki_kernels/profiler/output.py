"""Files of a profile: the suffix says what; nothing is overwritten unasked or left half-written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from nki_kernels.machine.errors import OptionError

#: What a file holds, by the end of its name; the first that fits counts.
KINDS = ((".perfetto.json", "perfetto"), (".json", "json"), (".html", "html"))


def kind_of(path: str | Path) -> str:
    """Return what a path asks for: "html", "perfetto" or "json".

    Raises:
        OptionError: its name ends in something else.
    """
    for suffix, kind in KINDS:
        if str(path).endswith(suffix):
            return kind
    allowed = ", ".join(f"{suffix} ({kind})" for suffix, kind in KINDS)
    raise OptionError(f"profile: output {str(path)!r}; its name ends in one of {allowed}")


def check(path: str | Path, *, force: bool) -> Path:
    """Return the path if a file can be written there.

    Raises:
        OptionError: another suffix, a file that exists, a directory that does not or that cannot
            be written to.
    """
    kind_of(path)
    target = Path(path)
    if target.is_dir():
        raise OptionError(f"profile: output {str(path)!r} is a directory; name a file in it")
    if target.exists() and not force:
        raise OptionError(
            f"profile: output {str(path)!r} exists; name another file, or pass --force (in Python "
            "force=True) to replace it"
        )
    parent = target.parent
    if not parent.is_dir():
        raise OptionError(
            f"profile: output {str(path)!r}: no directory {str(parent)!r}; make it first"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OptionError(
            f"profile: output {str(path)!r}: no permission to write to {str(parent)!r}; choose a "
            "directory you may write to"
        )
    return target


def save(path: str | Path, render: Callable[[str], str], *, force: bool = False) -> Path:
    """Write one file; see `save_all`."""
    return save_all([path], render, force=force)[0]


def save_all(
    paths: list[str | Path] | list[str], render: Callable[[str], str], *, force: bool = False
) -> list[Path]:
    """Write files: all rendered and written aside first, then each moved into place.

    Args:
        paths: where to; the end of each name says what.
        render: gives the text of one kind.
        force: replace files that exist.

    Raises:
        OptionError: see `check`; also where writing fails, with the reason.
    """
    targets = [check(path, force=force) for path in paths]
    texts = {target: render(kind_of(target)) for target in targets}
    _write(texts, force=force)
    return targets


def _write(texts: Mapping[Path, str], *, force: bool) -> None:
    aside: dict[Path, str] = {}
    try:
        for target, text in texts.items():
            handle, aside[target] = tempfile.mkstemp(
                dir=target.parent, prefix=f".{target.name}.", suffix=".part"
            )
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            # mkstemp keeps its file private; a report is like any other file the user makes.
            os.chmod(aside[target], 0o666 & ~_umask())
        for target in list(aside):
            if force:
                os.replace(aside[target], target)
            else:
                os.link(aside[target], target)  # refuses a file that appeared meanwhile
                os.unlink(aside[target])
            del aside[target]
    except OSError as error:
        name = str(next(iter(aside), next(iter(texts))))
        raise OptionError(
            f"profile: output {name!r} cannot be written: {error.strerror or error}; choose "
            "another place"
        ) from error
    finally:
        for name in aside.values():
            with contextlib.suppress(OSError):
                os.unlink(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
