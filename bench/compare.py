"""``python -m bench compare OLD.json NEW.json``: what changed between two runs of the model.

Modelled times repeat to the last bit, so any difference is a change of a kernel or of the model,
and is listed. Only a case that became slower than the threshold, fails its check now or is gone
makes the exit code 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.record import BenchError, Result
from bench.table import render

#: A case slower by more than this is a regression, in percent of its old time.
THRESHOLD_PERCENT = 1.0


@dataclass(frozen=True, slots=True)
class Change:
    """One case that is not as it was.

    Attributes:
        case: operator, shape, dtype and target.
        old_us, new_us: modelled times; None where there is none.
        what: slower, faster, fails, passes, new or gone.
        why: what else differs, in words.
        bad: a regression.
    """

    case: str
    old_us: float | None
    new_us: float | None
    what: str
    why: str = ""
    bad: bool = False

    @property
    def percent(self) -> float | None:
        """The change of the time, in percent of the old one."""
        if self.old_us is None or self.new_us is None:
            return None
        return 100 * (self.new_us / self.old_us - 1)


def compare(
    old: Sequence[Result], new: Sequence[Result], threshold: float = THRESHOLD_PERCENT
) -> list[Change]:
    """Return the changes, regressions first, then by size.

    Args:
        old: results of the earlier run.
        new: results of the later one.
        threshold: percent by which a case may become slower.

    Raises:
        BenchError: the runs have no case in common, or the threshold is negative.
    """
    if threshold < 0:
        raise BenchError(f"--threshold is {threshold}; allowed are 0 and more; name percent")
    before, after = ({_name(r): r for r in results} for results in (old, new))
    if not before.keys() & after.keys():
        raise BenchError(
            f"the files have no case in common ({len(before)} and {len(after)} cases); compare two "
            "runs of the same operators, shapes, dtypes and targets"
        )
    found = [
        _change(name, before.get(name), after.get(name), threshold)
        for name in dict.fromkeys([*before, *after])
    ]
    changes = [change for change in found if change is not None]
    return sorted(changes, key=lambda c: (not c.bad, -abs(c.percent or 0.0)))


def compare_table(changes: Sequence[Change], cases: int) -> str:
    """Return the changes as a table, or one line when there are none."""
    if not changes:
        return f"no change in {cases} cases (modelled times, exact)"
    rows = [
        (c.case, _us(c.old_us), _us(c.new_us),
         "-" if c.percent is None else f"{c.percent:+.2f}", c.what.upper() if c.bad else c.what)
        for c in changes
    ]  # fmt: skip
    lines = render(rows, ("case (model)", "old us", "new us", "%", "what"), left=1)
    lines += [f"{c.case}: {c.why}" for c in changes if c.why]
    bad = sum(c.bad for c in changes)
    lines.append(f"{len(changes)} of {cases} cases changed, {bad} for the worse")
    return "\n".join(lines)


def _name(result: Result) -> str:
    return f"{result.op} {result.shape} {result.dtype} {result.target}"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _change(name: str, old: Result | None, new: Result | None, threshold: float) -> Change | None:
    if old is None or new is None:
        one = old or new
        time = None if one is None else one.modelled_us
        return Change(name, time if old else None, time if new else None,
                      "gone" if old else "new", bad=new is None)  # fmt: skip
    before, after = old.modelled_us, new.modelled_us
    if before is None or after is None:
        if before is after:
            return None
        why = f"its check fails: {new.failure}" if after is None else ""
        return Change(name, before, after, "fails" if after is None else "passes", why,
                      bad=after is None)  # fmt: skip
    if before == after:
        return None
    bad = after > before * (1 + threshold / 100)
    return Change(name, before, after, "slower" if after > before else "faster",
                  _reason(old, new), bad)  # fmt: skip


def _reason(old: Result, new: Result) -> str:
    reasons = []
    if dict(old.config) != dict(new.config):
        parts = [
            f"{key} {old.config.get(key)!r} -> {new.config.get(key)!r}"
            for key in dict.fromkeys([*old.config, *new.config])
            if old.config.get(key) != new.config.get(key)
        ]
        reasons.append(f"config: {', '.join(parts)}")
    if old.kernel_source_hash != new.kernel_source_hash:
        reasons.append("the kernel's source differs")
    if old.limiting_engine != new.limiting_engine:
        reasons.append(f"limited by {new.limiting_engine}, was {old.limiting_engine}")
    old_bytes, new_bytes = ((r.hbm_read_bytes or 0) + (r.hbm_write_bytes or 0) for r in (old, new))
    if old_bytes != new_bytes:
        reasons.append(f"{new_bytes:,} bytes of HBM traffic, were {old_bytes:,}")
    if old.instructions != new.instructions:
        reasons.append(f"{new.instructions} instructions, were {old.instructions}")
    return "; ".join(reasons) or "same kernel, config and traffic: the timing model differs"
