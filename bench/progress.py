"""Work in this process or in several, behind a progress bar, remembered until the command ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from bench.record import BenchError

_T = TypeVar("_T")
_R = TypeVar("_R")

#: Set for worker processes: threads of several BLAS on the same cores multiply the time.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def progress(items: Sequence[_T], label: Callable[[_T], str]) -> Iterable[_T]:
    """Yield the items behind a progress bar on standard error, when that is a terminal."""
    with _bar(len(items)) as advance:
        for item in items:
            advance(label(item), 0)
            yield item
            advance(label(item), 1)


def each(
    work: Callable[[_T], _R], items: Sequence[_T], label: Callable[[_T], str], jobs: int = 1
) -> Iterator[tuple[int, _R]]:
    """Yield (index, result) of `work` on every item, as they are done.

    Args:
        work: a function at the top of a module, so that another process can import it.
        items: what to work on; sent to the process that does it.
        label: what the progress bar calls an item.
        jobs: processes; with 1 everything happens here, in order.
    """
    if jobs == 1 or len(items) < 2:
        for index, item in enumerate(progress(items, label)):
            yield index, work(item)
        return
    with _bar(len(items)) as advance, _one_thread_each():
        # spawn: a fork would copy the bar's thread in the middle of whatever it holds.
        pool = ProcessPoolExecutor(
            jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_ignore_interrupt
        )
        try:
            futures = {pool.submit(work, item): index for index, item in enumerate(items)}
            for future in as_completed(futures):
                index = futures[future]
                advance(label(items[index]), 1)
                yield index, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupt() -> None:
    """Leave Ctrl-C to the parent, which lets running items end and starts no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str, int], None]]:
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
    except ModuleNotFoundError:
        raise BenchError(
            "the progress bar needs the package rich; install the extra with pip install '.[bench]'"
        ) from None

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)

        def advance(description: str, steps: int) -> None:
            bar.update(task, description=description, advance=steps)

        yield advance


class Journal:
    """What a command has finished, one JSON line each, so that a rerun goes on from there.

    Lines made from other sources, or torn by an interruption, are passed over.

    Args:
        path: the file; None keeps nothing.
        key: what a line depends on, for example a hash of all sources.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path = path
        self.key = key
        self.found: dict[str, Any] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                self._take(line)

    def _take(self, line: str) -> None:
        try:
            content = json.loads(line)
            if content["key"] == self.key:
                self.found[content["name"]] = content["record"]
        except (ValueError, KeyError, TypeError):
            return

    def add(self, name: str, record: Any) -> None:
        """Remember that `name` is done, with its record (JSON values)."""
        self.found[name] = record
        if self.path is not None:
            line = json.dumps({"key": self.key, "name": name, "record": record})
            # A newline first: the last line may be torn.
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")

    def close(self) -> None:
        """Forget everything: the command's own output has it now."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
