"""Results as CSV and as a Markdown table, for spreadsheets and for pages."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence

from bench.record import Result
from bench.table import COLUMNS, group_label, grouped, result_row


def to_csv(results: Sequence[Result]) -> str:
    """Return one row per result, a column per field of `Result`; mappings are JSON."""
    names = [field.name for field in dataclasses.fields(Result)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for result in results:
        writer.writerow([_cell(getattr(result, name)) for name in names])
    return text.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, dict):
        return json.dumps(value)
    return "" if value is None else value


def to_markdown(results: Sequence[Result]) -> str:
    """Return one Markdown table per operator and target, with its source."""
    blocks = []
    for (op, target), group in grouped(results).items():
        rows: list[tuple[str, ...]] = [COLUMNS]
        rows += [("---", "---", "---", "---", "---:", "---", "---:", "---:")]
        rows += [result_row(result) for result in group]
        lines = [f"**{op} on {target} ({group_label(group)})**", ""]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
