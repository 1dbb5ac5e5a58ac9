"""Every design against every other one, and what that leaves of their order: rank intervals and groups.

The contrasts are those of `verdicts.contrasts`: for the designs if each was run twice or more, otherwise for the
checkpoints. Holm's correction spans all pairs of all groups of tasks, so the chance that any two equal designs are told
apart anywhere is about alpha (`results/type1.md`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from poolwise.errors import StatisticsError
from poolwise.verdicts.arms import Arm, arms, natural
from poolwise.verdicts.contrasts import Row, Rules, contrast, corrected, run_squares, thin_groups
from poolwise.verdicts.table import Note, early_only, with_origins, without_copies

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Place:
    """The place of one design in one group of tasks.

    `mean` (0–1) is over runs and sources. `rank_low` is 1 + the number of designs shown to score above it, `rank_high`
    the number of designs less those shown to score below it. `tied` are the groups it belongs to: letters, each for a
    stretch of neighbours in the order of which no two are told apart.
    """

    group: str
    design: str
    mean: float
    runs: int
    rank_low: int
    rank_high: int
    tied: str


@dataclass(frozen=True)
class Pairs:
    """All contrasts of all pairs, group by group: in each row the later design of the order against the earlier one.

    `margin` and `alpha` as in a `Comparison`; `notes` are sentences, those on what was left out included.
    """

    by: str
    designs: tuple[str, ...]
    groups: tuple[str, ...]
    rows: tuple[Row, ...]
    arms: tuple[Arm, ...]
    alpha: float
    margin: float
    notes: tuple[str, ...]

    @property
    def family(self) -> int:
        """Number of contrasts that Holm's correction spans."""
        return len(self.rows)

    @property
    def scope(self) -> str:
        """`designs` if the contrasts are between designs, `checkpoints` if they are between single runs."""
        return "designs" if any(row.verdict for row in self.rows) else "checkpoints"

    def above(self, group: str) -> set[tuple[str, str]]:
        """(better, worse) for each pair of a group that is told apart."""
        found = set()
        for row in (row for row in self.rows if row.group == group):
            if (word := word_of(row, self.alpha)) in ("better", "worse"):
                pair = (row.design, row.baseline)
                found.add(pair if word == "better" else pair[::-1])
        return found

    @property
    def places(self) -> tuple[Place, ...]:
        """The designs of each group, the highest mean first."""
        found = []
        for group in self.groups:
            mine = sorted((arm for arm in self.arms if arm.group == group), key=lambda arm: -_mean(arm))
            order = [arm.design for arm in mine]
            above = self.above(group)
            letters = tied_groups(order, above)
            for arm in mine:
                better = sum((other, arm.design) in above for other in order)
                worse = sum((arm.design, other) in above for other in order)
                tied = "".join(letter for letter, names in letters.items() if arm.design in names)
                low, high = 1 + better, len(order) - worse
                found.append(Place(group, arm.design, _mean(arm), len(arm.seeds), low, high, tied))
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """The content of `poolwise compare --all-pairs --json` and `--leaderboard --json`."""
        shown = ("difference", "ci_low", "ci_high", "p_value", "p_holm")
        return {
            "pairs": [
                {"group": row.group, "design": row.design, "baseline": row.baseline, "n": row.n, "tasks": row.tasks}
                | {name: getattr(row.verdict or row, name) for name in shown}
                | {"verdict": word_of(row, self.alpha)}
                for row in self.rows
            ],
            "scope": self.scope,
            "leaderboard": [asdict(place) for place in self.places],
            "notes": list(self.notes),
            "cases": {str(note): list(note.cases) for note in self.notes if isinstance(note, Note) and note.cases},
        }


def word_of(row: Row, alpha: float) -> str:
    """The verdict of a pair; of the checkpoints if there is none on designs, `untested` if nothing could be tested."""
    if row.verdict:
        return row.verdict.verdict
    if row.p_holm is None:
        return "untested"
    if row.p_holm > alpha:
        return "inconclusive"
    return "better" if row.difference > 0 else "worse"


def _mean(arm: Arm) -> float:
    """Mean over runs and sources: what the contrasts compare."""
    return float(arm.by_source.mean())


def tied_groups(order: Sequence[str], above: set[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Letter -> a longest stretch of neighbours in the order of which no two are told apart, the highest first.

    Designs that are told apart from both neighbours get a letter of their own, so that everyone has one.
    """
    stretches: list[tuple[str, ...]] = []
    for start in range(len(order)):
        end = start + 1
        while end < len(order) and not any(
            (name, order[end]) in above or (order[end], name) in above for name in order[start:end]
        ):
            end += 1
        stretch = tuple(order[start:end])
        if not stretches or not set(stretch) <= set(stretches[-1]):
            stretches.append(stretch)
    return {_letter(i): stretch for i, stretch in enumerate(stretches)}


def _letter(number: int) -> str:
    """a to z, then a1, b1 …"""
    turn, place = divmod(number, 26)
    return chr(ord("a") + place) + (str(turn) if turn else "")


def all_pairs(
    frame: pl.DataFrame,
    by: str = "task_type",
    controls: Iterable[str] = (),
    margin: float = 0.005,
    alpha: float = 0.05,
    missing: str = "error",
    order: Sequence[str] = (),
    notes: Sequence[Note] = (),
) -> Pairs:
    """Compare every two designs of a long table, group by group.

    Args:
        frame, by, controls, margin, alpha, missing, order: as in `comparison.compare`; controls are left out.
        notes: on how the table was read.

    Raises:
        StatisticsError: fewer than two designs; whatever `comparison.compare` refuses.
    """
    asked = set(controls)
    present = [name for name in frame["design"].unique(maintain_order=True).to_list() if name not in asked]
    if len(present) < 2:
        raise StatisticsError(f"pairs take two designs; the scores contain {', '.join(present) or 'controls only'}")
    rank = {name: place for place, name in enumerate(order)}
    designs = sorted(present, key=lambda name: (rank.get(name, len(rank)), natural(name)))
    early = early_only(frame)
    frame, copies = without_copies(frame)
    frame, origins = with_origins(frame)
    groups, excluded = arms(frame, designs, [], by, missing)
    squares = run_squares(groups, designs)
    pairs = list(combinations(designs, 2))
    rules = Rules(margin, alpha, len(groups) * len(pairs), cautious=True)
    rows = [_pair(group, pair, designs, rules, squares) for group in groups.values() for pair in pairs]
    tested, _ = corrected(rows, (), alpha)
    thin = thin_groups(groups, designs[0])
    return Pairs(
        by, tuple(designs), tuple(groups), tested, tuple(arm for group in groups.values() for arm in group.values()),
        alpha, margin, (*notes, *early, *copies, *origins, *excluded, *thin),
    )  # fmt: skip


def _pair(
    group: Mapping[str, Arm], pair: tuple[str, str], designs: Sequence[str], rules: Rules,
    squares: Mapping[str, Mapping[str, float]],
) -> Row:  # fmt: skip
    first, second = pair
    lent = [group[name] for name in designs if name not in pair]
    return contrast(group[first], group[second], lent, rules, squares)
