"""Results: one record per timed case, and the JSON file that holds them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nki_kernels.machine.errors import NkiKernelsError

#: Raised when a field is renamed, removed or changes its meaning.
SCHEMA_VERSION = 1

ROOT = Path(__file__).resolve().parent.parent

_RUN = "'python -m bench run --json'"


class BenchError(NkiKernelsError):
    """A request to the benchmark that cannot be met. Nothing has been written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One case of one operator, by the timing model.

    Attributes:
        shape: the name or free-form text that was asked for; `axes` are its sizes.
        config: the tuning config that was timed, and checked.
        correct: the comparison with the reference passed under the error rule.
        checked_at: "full", or the sizes of the reduced problem that ran the same code path.
        check_cached: the check was made by an earlier run of byte-identical sources.
        failure: the comparison's message when `correct` is false; nothing is timed then.
        source: where the times come from: "model".
        projected: the target's hardware numbers are announced ones, not measured.
        validated: whether the model's own error on real hardware is known.
        modelled_us: kernel start and end included.
        limiting_engine: the engine that is busy longest.
        mfu_estimated_percent: useful FLOPs over `peak_tflops` (that of `dtype`) times the time.
        percent_of_roofline: max(FLOP, compulsory-byte) bound over the time.
        hbm_read_bytes, hbm_write_bytes: counted from the trace; `min_hbm_bytes` is compulsory.
        instructions: events in the trace.
        estimated_constants: estimates among the hardware numbers the time rests on.
    """

    op: str
    shape: str
    axes: Mapping[str, int]
    dtype: str
    target: str
    lnc: int
    config: Mapping[str, Any]
    correct: bool
    checked_at: str
    check_cached: bool
    failure: str | None = None
    source: str = "model"
    projected: bool
    validated: bool = False
    modelled_us: float | None = None
    limiting_engine: str | None = None
    mfu_estimated_percent: float | None = None
    percent_of_roofline: float | None = None
    hbm_read_bytes: int | None = None
    hbm_write_bytes: int | None = None
    min_hbm_bytes: int
    flops: int
    peak_tflops: float
    instructions: int | None = None
    estimated_constants: int | None = None
    kernel_source_hash: str
    git_sha: str
    schema_version: int = SCHEMA_VERSION


@cache
def git_sha() -> str:
    """Return the commit of the clone, with "-dirty" when files differ; "unknown" without git."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def require_writable(path: Path, option: str = "--json") -> None:
    """Check that `path`, named by `option`, can be written, before any work is done for it.

    Raises:
        BenchError: its folder is missing or not writable, or it is no regular file.
    """
    folder = path.resolve().parent
    if path.is_dir():
        reason = "is a folder; name a file in it"
    elif path.exists() and not path.is_file():
        reason = "is no regular file; name a file, which is replaced in one step"
    elif not folder.is_dir():
        reason = f"the folder {folder} does not exist; create it first"
    elif not os.access(folder, os.W_OK):
        reason = f"the folder {folder} is not writable; name a file elsewhere"
    else:
        return
    raise BenchError(f"{option} {path}: {reason}")


def write_json(path: Path, kind: str, records: Sequence[Any]) -> None:
    """Write records (dataclasses) to `path`, whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        kind: "model" or "host": the one source of all records.
        records: instances of one dataclass.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "source": kind,
        "results": [dataclasses.asdict(record) for record in records],
    }
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, whole or not at all.

    It goes to a temporary file in the same folder, which then replaces `path` in one step, so a
    failure or an interruption leaves an existing file as it was.
    """
    path = path.resolve()  # through a link, the file it names is replaced, not the link
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes the file private; give it the mode a plain open() would have.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_results(path: Path) -> list[Result]:
    """Read the results that `run --json` wrote.

    Raises:
        BenchError: no such file, not JSON, not ours, of another version, or not of `run`.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(
            f"{path}: cannot be read ({error.strerror}); name a file of {_RUN}"
        ) from None
    except ValueError as error:
        raise BenchError(f"{path}: is no JSON ({error}); name a file of {_RUN}") from None
    if not isinstance(document, dict) or not {"schema_version", "source", "results"} <= set(
        document
    ):
        raise BenchError(f"{path}: is JSON of something else; name a file of {_RUN}")
    version = document["schema_version"]
    if version != SCHEMA_VERSION:
        raise BenchError(
            f"{path}: has schema version {version!r}; this is version {SCHEMA_VERSION}; make the "
            "file anew"
        )
    records = document["results"]
    fields = {field.name for field in dataclasses.fields(Result)}
    if document["source"] != "model" or not isinstance(records, list):
        raise BenchError(f"{path}: holds {document['source']!r} figures; name a file of {_RUN}")
    for record in records:
        if not isinstance(record, dict) or set(record) != fields:
            raise BenchError(
                f"{path}: holds records that are no timed cases; name a file of {_RUN}"
            )
    return [Result(**record) for record in records]
