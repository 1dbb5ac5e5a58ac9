"""What the designs of a study cost, kept in the study's folder, so that a comparison needs no model library."""

from __future__ import annotations

import json
from typing import Any

from poolwise.errors import PoolwiseError
from poolwise.results import write_atomic
from poolwise.study import Study


def known_costs(study: Study) -> list[dict[str, Any]]:
    """The cost table; empty where the base model cannot be reached any more."""
    try:
        return mean_costs(study)
    except (PoolwiseError, OSError):
        return []


def mean_costs(study: Study) -> list[dict[str, Any]]:
    """One row a design: its costs averaged over the study's base models."""
    rows = [row for row in costs_of(study) if row.get("base", study.bases[0]) in study.bases]
    found = []
    for design in study.designs:
        mine = [row for row in rows if row["design"] == design.name]
        mean = {key: sum(row[key] for row in mine) / len(mine) for key, value in mine[0].items() if type(value) is int}
        found.append(mine[0] if len(mine) == 1 else {**mine[0], **mean})
    return found


def costs_of(study: Study) -> list[dict[str, Any]]:
    """The cost table, kept in the study's folder: reading it needs no model library."""
    path = study.folder / "costs.json"
    if path.exists():
        rows = json.loads(path.read_text(encoding="utf-8"))
        have = {(row["design"], row.get("base", study.bases[0])) for row in rows}
        if have >= {(design.name, base) for design in study.designs for base in study.bases}:
            return rows  # type: ignore[no-any-return]
    from poolwise.running.preview import costs

    rows = costs(study)
    write_atomic(path, json.dumps(rows))
    return rows
