"""Public prompt sets as their files come: what their fields are called, and lines of CSV.

    Spec-Bench, MT-bench   question_id, category, turns, reference          (as prompts.py has them)
    HumanEval              task_id, prompt, canonical_solution
    GSM8K                  question, answer (a solution that ends in `#### 42`)
    translation pairs      source, and target, reference or references
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from specbeam.errors import InputError

OURS = ("prompt", "text", "messages", "turns")


def our_fields(record: Any, template: str | None = None) -> Any:
    """A line of a public set in the fields of prompts.py; anything else as it is.

    template: what is asked of a translation pair, with {source} where the text goes, as in
    "Translate English to German: {source}".
    """
    if not isinstance(record, dict):
        return record
    if "task_id" in record and "canonical_solution" in record:
        return {"prompt": record.get("prompt"), "id": str(record["task_id"]).replace("/", "-"), "category": "code",
                "reference": record["canonical_solution"]}
    if any(record.get(name) is not None for name in OURS):
        return record
    kept = {name: record[name] for name in ("id", "category") if record.get(name) is not None}
    if {"question", "answer"} <= set(record):
        return {"category": "math", **kept, "prompt": record["question"], "reference": record["answer"]}
    if isinstance(record.get("source"), str):
        references = next((record[name] for name in ("references", "reference", "target") if record.get(name)), None)
        several = [references] if isinstance(references, list) else references  # of one answer
        prompt = record["source"] if template is None else template.replace("{source}", record["source"])
        return {"category": "translation", **kept, "prompt": prompt, "references": several}
    return record


def check_template(template: Any) -> None:
    if template is not None and not (isinstance(template, str) and "{source}" in template):
        raise InputError(f"prompt_set.template is {template!r}: give a text that holds {{source}}, or null.")


def csv_records(text: str, place: str, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and record of each row of a CSV file with a header. A cell that is a JSON list is one; empty cells
    are left out. Raises InputError for a row that is longer than the header, and for what is no CSV."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a long document is a cell like another
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    for row in _readable(rows, place):
        if None in row:
            raise InputError(f"{place}, line {rows.line_num} has more cells than the header: quote cells that hold a "
                             f"{delimiter!r}.")
        record: dict[str, Any] = {name.strip(): value for name, value in row.items() if value and value.strip()}
        for name in ("references", "reference", "turns", "messages"):
            if str(record.get(name, "")).lstrip().startswith("["):
                try:
                    record[name] = json.loads(record[name])
                except ValueError:
                    continue
        if record:
            yield rows.line_num, record


def _readable(rows: csv.DictReader, place: str) -> Iterator[dict[Any, Any]]:
    try:
        yield from rows
    except csv.Error as error:
        raise InputError(f"{place}, line {rows.reader.line_num} cannot be read as CSV ({error}): save the file anew "
                         "from the program that wrote it.") from None
