"""How often a study may be looked at: planned seeds, one declared extension, and what was seen when.

Testing again whenever a few seeds were added finds differences between equal designs (at 3, 5, 7 and 10 seeds: .15
instead of .05). So a study is tested when its planned seeds are complete, and once more at `extend_to` seeds if that
was declared before the first run, at .03 each (`poolwise.stats.TWO_LOOK_ALPHA`). In between, differences are shown and
nothing is tested; seeds that were never declared make every verdict exploratory.

FOLDER/looks.json holds the plan as it was when the study began, whether it was extended, and the looks taken.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from poolwise.errors import CheckpointError, DataError
from poolwise.files import write_atomic
from poolwise.runs import layout
from poolwise.stats.many import TWO_LOOK_ALPHA

if TYPE_CHECKING:
    from poolwise.study.study import Study
    from poolwise.verdicts.comparison import Comparison


ALPHA = 0.05


@dataclass(frozen=True)
class Plan:
    """`planned` seeds, `extend_to` as declared, `extended`: the extension has begun; `looks` in the order taken."""

    planned: tuple[int, ...]
    extend_to: int | None
    extended: bool = False
    looks: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class State:
    """Which `seeds` to compare, each test at `alpha`, and why it is `interim` or `exploratory` (empty: neither).

    `look`: 1 or 2 where the seeds of that look are complete, else 0; `note`: what is said of the looks.
    """

    seeds: tuple[int, ...]
    alpha: float
    interim: str = ""
    exploratory: str = ""
    look: int = 0
    note: str = ""


def plan(study: Study) -> Plan:
    """The plan of a study as it began; as it stands, where it has not begun.

    Raises DataError for a damaged file.
    """
    path = study.folder / layout.LOOKS
    if not path.exists():
        return Plan(tuple(study.seeds), study.extend_to)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Plan(tuple(raw["planned"]), raw["extend_to"], raw["extended"], tuple(raw["looks"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); restore it, for it says which seeds were planned") from None


def running(study: Study, extend: bool = False) -> Study:
    """The study with the seeds that are to run now: once extended, it stays so.

    Raises StudyError for an extension that was not declared.
    """
    return study.extended() if extend or plan(study).extended else study


def begin(study: Study, extend: bool = False) -> None:
    """Keep the plan the first time that the study runs, and that it was extended."""
    found = plan(study)
    if (extend and not found.extended) or not (study.folder / layout.LOOKS).exists():
        _write(study, replace(found, extended=extend or found.extended))


def check_extension(study: Study, unfinished: Collection[str]) -> None:
    """Refuse an extension before the planned seeds are complete; `unfinished` names the trials that are missing.

    Raises StudyError where none was declared, CheckpointError where the first look is still to come.
    """
    study.extended()
    if unfinished and not plan(study).extended:
        shown = ", ".join(list(unfinished)[:5]) + (", …" if len(unfinished) > 5 else "")
        raise CheckpointError(
            f"--extend comes after the first look, and runs are missing for that: {shown}; run the study without "
            "--extend first"
        )


def state(study: Study, done: Collection[tuple[str, int]]) -> State:
    """What the runs that are `done` (design, seed) allow to say."""
    found = plan(study)
    alpha = TWO_LOOK_ALPHA if study.extend_to else ALPHA
    wanted = study.all_seeds if found.extended else study.seeds

    def missing(seeds: Collection[int]) -> list[str]:
        return [f"{design.name} seed {seed}" for seed in seeds for design in study.designs
                if (design.name, seed) not in done]  # fmt: skip

    left = missing(wanted)
    if set(found.planned) != set(study.seeds):
        why = (
            f"Exploratory: the study was planned with {_named(found.planned)} and now has {_named(study.seeds)}. Seeds "
            "chosen after a look find differences that are not there; a verdict needs the seeds declared beforehand."
        )
        return State(tuple(wanted), alpha, interim=_interim(left), exploratory=why)
    if not left:
        look, note = 1 + found.extended, ""
        if study.extend_to:
            note = f"Look {look} of 2 ({_named(wanted)}), each tested at {_short(alpha)}."
            note += "" if found.extended else f" Declared: up to {study.extend_to} seeds, by poolwise run --extend."
        return State(tuple(wanted), alpha, look=look, note=note)
    if found.extended and not missing(study.seeds):
        note = f"Look 1 of 2 ({_named(study.seeds)}), at {_short(alpha)}; the extension still runs and is not shown."
        return State(tuple(study.seeds), alpha, look=1, note=note)
    return State(tuple(wanted), alpha, interim=_interim(left))


def record(study: Study, at: State, comparison: Comparison) -> tuple[dict[str, Any], ...]:
    """Keep what a declared look showed, the first time that it is taken; returns all looks. Only with `extend_to`."""
    found = plan(study)
    if not study.extend_to or not at.look or not (study.folder / layout.LOOKS).exists():
        return found.looks
    if all(look["look"] != at.look for look in found.looks):
        verdicts = [
            {"group": row.group, "design": row.design, **{k: v for k, v in asdict(row.verdict).items() if k in KEPT}}
            for row in comparison.rows
            if row.verdict
        ]
        taken = datetime.now(UTC).isoformat(timespec="seconds")
        look = {"look": at.look, "seeds": list(at.seeds), "alpha": at.alpha, "taken": taken, "verdicts": verdicts}
        found = replace(found, looks=(*found.looks, look))
        _write(study, found)
    return found.looks


KEPT = ("difference", "ci_low", "ci_high", "p_value", "p_holm", "verdict")


def earlier(looks: Collection[dict[str, Any]], at: State) -> str:
    """What the first look showed, in one sentence, at the second; empty otherwise."""
    first = next((look for look in looks if look["look"] == 1), None)
    if at.look != 2 or first is None:
        return ""
    told: dict[tuple[str, str], list[str]] = {}
    for found in first["verdicts"]:
        told.setdefault((found["group"], found["verdict"]), []).append(found["design"])
    parts = [f"{group}: {', '.join(designs)} {word}" for (group, word), designs in told.items()]
    return f"The first look ({_named(first['seeds'])}, {first['taken'][:10]}) said: {'; '.join(parts)}."


def _interim(left: Collection[str]) -> str:
    if not left:
        return ""
    names = list(left)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"Interim: runs are missing ({shown}). Differences stand as they are; nothing is tested yet."


def _named(seeds: Collection[int]) -> str:
    found = sorted(seeds)
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"seeds {found[0]} to {found[-1]}"
    return f"seed{'s' * (len(found) > 1)} {', '.join(map(str, found))}"


def _short(alpha: float) -> str:
    return f"{alpha:.2f}".removeprefix("0")


def _write(study: Study, content: Plan) -> None:
    write_atomic(study.folder / layout.LOOKS, json.dumps(asdict(content), indent=1) + "\n")
