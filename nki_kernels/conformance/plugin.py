"""The pytest plugin that runs AWS's test files: their fixtures, a choice of rows, the record.

It takes the place of the library's own ``conftest.py``, which needs AWS's fleet.
"""

from __future__ import annotations

import json
import math
import random
import re
import resource
import signal
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nki_kernels.conformance import shims
from nki_kernels.conformance.orchestrator import Orchestrator, TooLarge
from nki_kernels.machine.errors import NkiKernelsError

RECORD = "conformance"
_SEED = 0
#: Bytes a process may hold.
_MEMORY = 8 * 2**30
_RANGE_FIXTURE = "range_test_options"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the command, handed on to the workers."""
    parser.addoption("--library", type=Path, help="checkout of nki-library")
    parser.addoption("--rows", type=int, default=0, help="rows of a test, the smallest; 0: all")
    parser.addoption("--megabytes", type=int, default=64, help="arrays of a case at most")
    parser.addoption("--seconds", type=int, default=60, help="time of a case at most")
    parser.addoption("--platform-target", default="trn2", help="trn2 or trn3")
    parser.addoption("--coverage", default="singles", help="coverage of generated rows")


def pytest_configure(config: pytest.Config) -> None:
    """Make the library importable."""
    library = config.getoption("library")
    sys.modules.pop("test", None)  # Python's own, should anything have imported it
    sys.path[:0] = [str(library / "src"), str(library)]
    shims.install(Orchestrator)
    # Some rows fill a server's memory before they reach the kernel: they end in a MemoryError.
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    random.seed(_SEED)
    np.random.seed(_SEED)  # noqa: NPY002  AWS's tests draw from the global generator


@pytest.fixture
def test_manager(request: pytest.FixtureRequest) -> Orchestrator:
    """What a test hands its kernel to."""
    found = Orchestrator(request.config.getoption("megabytes") * 2**20)
    request.node.orchestrator = found
    return found


@pytest.fixture
def collector() -> Any:
    """AWS's collector that collects nothing."""
    from test.utils.metrics_collector import NoopMetricsCollector  # type: ignore[import-not-found]

    return NoopMetricsCollector()


@pytest.fixture
def platform_target(request: pytest.FixtureRequest) -> Any:
    """The target as AWS's tests spell it."""
    from test.utils.common_dataclasses import Platforms  # type: ignore[import-not-found]

    return Platforms(request.config.getoption("platform_target"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Rows of tests that state ranges instead of rows, by AWS's own generators."""
    if _RANGE_FIXTURE in metafunc.fixturenames:
        import test.utils.ranged_test_harness as ranged  # type: ignore[import-not-found]

        function = metafunc.function
        key = ranged.RANGE_TEST_LIMIT_NUM_TESTS_ATTR_KEY
        limits = {key: getattr(function, key)} if hasattr(function, key) else {}
        random.seed(_SEED)
        config = getattr(function, ranged.RANGE_TEST_CONFIG_ATTR_KEY)
        ids, cases = ranged.RangeTestHarness(config, **limits).get_unique_test_cases()
        metafunc.parametrize(_RANGE_FIXTURE, cases, ids=ids)
        return
    marker = metafunc.definition.get_closest_marker("coverage_parametrize")
    if marker is None:
        return
    import test.utils.coverage_parametrized_tests as covered  # type: ignore[import-not-found]

    random.seed(_SEED)
    parameters = dict(marker.kwargs)
    settings = {
        name: parameters.pop(name)
        for name in (
            "enable_automatic_boundary_tests", "enable_invalid_combination_tests",
            "n_tests_per_boundary_value", "max_invalid_tests",
        )
        if name in parameters
    }  # fmt: skip
    coverage = parameters.pop("coverage", None) or metafunc.config.getoption("coverage")
    chosen = parameters.pop("filter", None)
    rows = covered.generate_parametrized_test_case(
        params=parameters, coverage=coverage, filter_func=chosen, **settings
    )
    names, values, ids = covered.extract_parametrize_args(parameters, rows)
    metafunc.parametrize(names, values, ids=ids)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of another target and, with ``--rows``, all but the smallest rows."""
    target = config.getoption("platform_target")
    wanted = config.getoption("rows")
    kept: list[pytest.Item] = []
    counts: Counter[Any] = Counter()
    for item in sorted(items, key=size) if wanted else items:
        marker = item.get_closest_marker("platforms")
        excluded = marker.kwargs.get("exclude") or [] if marker else []
        group = (item.nodeid.partition("[")[0], lnc_of(item), is_negative(item))
        if target in [p.value for p in excluded] or (wanted and counts[group] >= wanted):
            continue
        counts[group] += 1
        kept.append(item)
    items[:] = kept


def _parameters(item: pytest.Item) -> dict[str, Any]:
    spec = getattr(item, "callspec", None)
    return {} if spec is None else dict(spec.params)


def size(item: pytest.Item) -> float:
    """An order of size for the rows of one test: the sum of the logarithms of their numbers."""
    given = _parameters(item)
    numbers = [v for v in given.values() if isinstance(v, int) and v > 0]
    if not numbers:
        numbers = [int(n) for n in re.findall(r"\d+", item.name)]
    return sum(math.log2(n) for n in numbers if n > 0)


def lnc_of(item: pytest.Item) -> Any:
    """The row's core count, as far as its parameters tell."""
    given = _parameters(item)
    names = [n for n in given if "lnc" in n or "vnc" in n]
    return tuple(given[n] for n in names if isinstance(given[n], int))


def is_negative(item: pytest.Item) -> bool:
    """True for rows that AWS's kernels are to refuse."""
    given = _parameters(item)
    return any(given.get(n) is True for n in given if "negative" in n)


class TooLong(Exception):
    """A row took more time than the run gives it."""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, None]:
    """End a row after its time."""

    def late(number: int, frame: object) -> None:
        raise TooLong(f"more than {seconds} s")

    seconds = item.config.getoption("seconds")
    kept = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, kept)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, None]:
    """Add to the report what happened and why."""
    outcome = yield
    report = outcome.get_result()
    if report.when == "teardown" or (report.when == "setup" and report.passed):
        return
    orchestrator = getattr(item, "orchestrator", None)
    record = dict(orchestrator.record) if orchestrator else {"stage": "setup"}
    record["seconds"] = round(call.duration, 3)
    record["negative"] = is_negative(item)
    if call.excinfo is not None:
        error = call.excinfo.value
        if any(isinstance(e, TooLarge | TooLong) or _out_of_memory(e) for e in _chain(error)):
            record["stage"] = "too large"
        elif isinstance(error, pytest.skip.Exception):
            record["stage"] = "skipped"
        record["error"] = f"{type(error).__name__}: {error}"
        record["where"] = _innermost(call.excinfo)
    report.user_properties.append((RECORD, json.dumps(record, default=str)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it was raised while handling: AWS's tests wrap what they expect."""
    while error is not None:
        yield error
        error = error.__context__


def _out_of_memory(error: BaseException) -> bool:
    """NumPy and torch have an error each; `DoesNotFit` is the kernel's own and no such thing."""
    host = isinstance(error, MemoryError) and not isinstance(error, NkiKernelsError)
    return host or "can't allocate memory" in str(error)


def _innermost(excinfo: pytest.ExceptionInfo[BaseException]) -> str:
    """The last line of the library that the error passed through."""
    lines = [e for e in excinfo.traceback if "nkilib_src" in str(e.path)]
    return f"{Path(str(lines[-1].path)).name}:{lines[-1].lineno + 1}" if lines else ""
