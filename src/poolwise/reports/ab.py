"""The result of `poolwise ab` in words, tables and one picture a challenger: for the terminal, Markdown and HTML.

All functions take the dictionary of `poolwise ab --json` (`runs.ab.ab`); nothing is computed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise.files import write_atomic
from poolwise.reports import plots
from poolwise.reports.pages import page
from poolwise.reports.tables import Cells, Table
from poolwise.reports.words import above_or_below, count, decimals, interval, magnitude, number, points, probability
from poolwise.verdicts.items import FEWEST, OPEN, SAME, SWITCH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = {
    "ndcg_at_10": "NDCG@10", "recall_at_10": "recall@10", "recall_at_100": "recall@100", "mrr": "MRR", "map": "MAP",
    "cosine_spearman": "Spearman", "cosine_ap": "average precision", "accuracy": "accuracy",
}  # fmt: skip
FEATURES = {
    "retrieval": {"length": "Words of the query", "overlap": "Share of the query's words that its answers have"},
    "classification": {"length": "Words of the text"},
    "sts": {"length": "Words of the pair", "overlap": "Share of words in common"},
    "pair_classification": {"length": "Words of the pair", "overlap": "Share of words in common"},
}
CLIPPED = 160
"""Letters of a text that tables show; the JSON has it whole."""
SHOWN = 90
"""Letters of a text in the terminal."""
DRAWN = 600
"""Items in a picture at most; of more, every n-th is drawn."""


def headline(result: Mapping[str, Any]) -> str:
    """The decision in one sentence."""
    return sentence(result, result["decision"])


def sentence(result: Mapping[str, Any], answer: Mapping[str, Any]) -> str:
    """What one comparison says: switch, stay, no difference or not enough items, with the evidence."""
    base, design, noun = answer["baseline"], answer["design"], result["noun"]
    low, high, margin = answer["ci_low"], answer["ci_high"], result["margin"]
    digits = decimals(answer["difference"], low, high)
    scores = {model["label"]: model["scores"][result["metric"]]["mean"] for model in result["models"]}
    evidence = (
        f"{METRICS[result['metric']]} {points(scores[base], 1)} and {points(scores[design], 1)}; 95 % interval "
        f"{interval(low, high, digits)} points; {answer['n']:,} {noun}; p {probability(answer['p_holm'])}"
    )
    far = above_or_below(answer["difference"], digits)
    if answer["answer"] == SWITCH:
        small = " The gain is smaller than the margin." if answer["inner_high"] < margin else ""
        return f"Switch to {design}: it scores {far} {base} ({evidence}).{small}"
    if answer["answer"] == SAME:
        if answer["difference"] == low == high == 0:
            return f"No difference: {base} and {design} score alike on all {answer['n']:,} {noun}."
        inner = interval(answer["inner_low"], answer["inner_high"], digits)
        return f"No difference: the 90 % interval, {inner} points, lies within ±{points(margin, 1)} ({evidence})."
    if answer["n"] < FEWEST:
        return f"Not enough {noun}: {answer['n']} of them tell nothing that holds for others; give {FEWEST} or more."
    if answer["answer"] == OPEN:
        about = f"about {two_digits(answer['more']):,} more would settle" if answer["more"] else ""
        more = about or f"no number of {noun} would settle"
        rest = "" if answer["more"] else ", since the runs of a design differ too much: train more of them"
        return (
            f"Not enough {noun}: {design} may score from {points(low, digits)} to {points(high, digits, True)} points "
            f"above {base}; {more} a difference of {points(margin, 1)}{rest} ({evidence})."
        )
    if answer["p_holm"] <= 0.05:
        return f"Stay with {base}: {design} scores {far} it ({evidence})."
    return f"Stay with {base}: {design} does not gain {points(margin, 1)} points ({evidence})."


def two_digits(value: int) -> int:
    """A whole number rounded up to two significant digits: 1,793 is about 1,800."""
    unit = 10 ** max(0, len(str(value)) - 2)
    return -(-value // unit) * unit


def scope_words(answer: Mapping[str, Any]) -> str:
    """What an answer is about."""
    return "these designs on this data" if answer["scope"].startswith("these two designs") else "these models"


def sentences(result: Mapping[str, Any]) -> list[str]:
    """Every answer with its scope, if there is more than the decision."""
    several = len(result["answers"]) > 1
    return [f"For {scope_words(each)}: {sentence(result, each)}" for each in result["answers"]] if several else []


def scores(result: Mapping[str, Any]) -> Table:
    """Every metric of every model with its 95 % interval over items."""
    models = result["models"]

    def cell(model: Mapping[str, Any], metric: str) -> str:
        found = model["scores"][metric]
        return f"{points(found['mean'])} ({interval(found['ci_low'], found['ci_high'], 1)})"

    rows = tuple((METRICS[m], *(cell(model, m) for model in models)) for m in models[0]["scores"])
    runs = max(len(model["runs"]) for model in models)
    note = f"×100, with the 95 % interval over {result['noun']}{'; runs averaged' if runs > 1 else ''}."
    return Table("Scores", ("Metric", *(model["label"] for model in models)), (("", rows),), note)


def differences(result: Mapping[str, Any]) -> Table:
    """The differences to the model in use on every metric, with p and wins, ties and losses."""
    lines = result["comparisons"]
    sections = []
    for design in dict.fromkeys(line["design"] for line in lines):
        rows = tuple(
            (
                METRICS[line["metric"]], scope_words(line), points(line["difference"], 2, True),
                interval(line["ci_low"], line["ci_high"]), probability(line["p_value"]), probability(line["p_holm"]),
                f"{line['wins']}/{line['ties']}/{line['losses']}", line["test"],
            )
            for line in lines
            if line["design"] == design
        )  # fmt: skip
        sections.append((design, rows))
    note = (
        f"Points above {result['baseline']}; Holm over the models, metric by metric. {METRICS[result['metric']]} "
        "decides; the other metrics are shown for information."
    )
    columns = ("Metric", "About", "Difference", "95 % interval", "p", "p Holm", "W/T/L", "Test")
    return Table(f"Differences to {result['baseline']}", columns, tuple(sections), note, text=2)


def speed(result: Mapping[str, Any]) -> Table:
    """Speed and size of the index, and latencies of single documents and queries."""

    def times(found: Mapping[str, float] | None) -> Cells:
        return tuple(number(found[p], 1) for p in ("p50", "p95", "p99")) if found else ("–", "–", "–")

    rows = tuple(
        (
            model["label"], number(model["index_texts_per_second"], 0) if model["index_texts_per_second"] else "–",
            f"{magnitude(model['index_bytes'])}B", *times(model["index_ms"]), *times(model["query_ms"]),
        )
        for model in result["models"]
    )  # fmt: skip
    note = (
        "Latencies in milliseconds (median, 95th and 99th percentile) of one text at a time on this machine, for a "
        "query with its exact search. Texts/s are those of the run that encoded the texts."
    )
    latencies = (f"{side} p{share}" for side in ("text", "query") for share in (50, 95, 99))
    columns = ("Model", "Texts/s", "Index", *latencies)
    return Table("Speed and size", columns, (("", rows),), note)


def by_feature(result: Mapping[str, Any]) -> Table:
    """The score of each model by length and overlap."""
    labels = [model["label"] for model in result["models"]]
    names = FEATURES[result["kind"]]

    def span(name: str, row: Mapping[str, Any]) -> str:
        low, high = ((f"{100 * v:.0f} %" if name == "overlap" else f"{v:.0f}") for v in (row["from"], row["to"]))
        return low if low == high else f"{low} to {high}"

    def cell(value: float | None) -> str:
        return "–" if value is None else points(value, 1)

    sections = tuple(
        (
            names[name],
            tuple(
                (span(name, row), f"{row['items']:,}", *(cell(row["scores"][label]) for label in labels))
                for row in rows
            ),
        )
        for name, rows in result["by_feature"].items()
    )
    note = f"{METRICS[result['metric']]} ×100 within each range."
    return Table("Where they differ", ("Range", result["noun"].capitalize(), *labels), sections, note)


def extremes(result: Mapping[str, Any], label: str, which: str) -> Table:
    """The largest gains or losses of one challenger, with their texts."""
    base = result["baseline"]
    found = result["extremes"][label][which]
    texts = list(found[0]["texts"]) if found else []
    firsts = list(found[0]["first"]) if found else []
    rows = tuple(
        (
            *(clip(row["texts"][name]) for name in texts), *(clip(row["first"].get(name, "")) for name in firsts),
            points(row["scores"][base], 1), points(row["scores"][label], 1), points(row["difference"], 1, True),
        )
        for row in found
    )  # fmt: skip
    columns = (
        *(name.capitalize() for name in texts), *(f"First of {name}" for name in firsts), base, label, "Difference"
    )  # fmt: skip
    return Table(f"Largest {which} of {label}", columns, (("", rows),), text=len(texts) + len(firsts))


def narrow(table: Table) -> Table:
    """A table of texts for the terminal: only the first text, shortened, and the numbers."""
    if not table.title.startswith("Largest"):
        return table
    rows = tuple((row[0][:SHOWN], *row[table.text :]) for row in table.rows)
    return Table(table.title, (table.columns[0], *table.columns[table.text :]), (("", rows),), table.note)


def clip(text: str) -> str:
    """The beginning of a text in one line."""
    line = " ".join(text.split())
    return line if len(line) <= CLIPPED else line[: CLIPPED - 1] + "…"


def picture(result: Mapping[str, Any], label: str) -> plots.Panel:
    """The difference on every item, the largest gain at the left."""
    values = [100 * value for value in result["differences"][label]]
    shown = values[:: max(1, len(values) // DRAWN)]
    gains, losses = sum(v > 0 for v in values), sum(v < 0 for v in values)
    alt = (
        f"{label} against {result['baseline']} on {count(len(values), 'item')}: {gains} gains, "
        f"{len(values) - gains - losses} ties, {losses} losses; from {number(values[0])} to {number(values[-1])}."
    )

    def draw(axes: Axes) -> None:
        places = range(len(shown))
        axes.set_xlim(-0.5, len(shown) - 0.5)
        axes.set_ylim(*plots.padded([0.0, *shown]))
        axes.axhline(0, color=plots.MUTED, linewidth=0.8)
        colours = [plots.BETTER if value > 0 else plots.WORSE for value in shown]
        axes.bar(places, shown, width=1.0, color=colours, linewidth=0)
        axes.set_xticks([])
        axes.grid(axis="y", color=plots.RULE, linewidth=0.7)
        axes.set_xlabel(f"{result['noun']}, sorted by difference", color=plots.MUTED, fontsize=11, labelpad=4)

    title = f"{label}: {METRICS[result['metric']]}, points above {result['baseline']}"
    return plots.sketch(title, alt, 240, 44, plots.RIGHT, draw)


def tables(result: Mapping[str, Any]) -> list[Table]:
    """All tables in the order in which they are read; those of the texts last."""
    found = [scores(result), differences(result), speed(result), by_feature(result)]
    for label in result["extremes"]:
        found += [extremes(result, label, which) for which in ("gains", "losses") if result["extremes"][label][which]]
    return found


def opening(result: Mapping[str, Any]) -> str:
    """What was compared on what."""
    size = f"{result['items']:,} {result['noun']}"
    size += f" on {count(result['documents'], 'document')}" if result["documents"] else ""
    others = ", ".join(model["label"] for model in result["models"][1:])
    return (
        f"{result['name']} ({result['kind'].replace('_', ' ')}): {size}; {result['baseline']} in use, against {others}."
    )


def render(result: Mapping[str, Any], command: str, folder: str | Path) -> list[Path]:
    """Write `ab.json`, `ab.md` and `ab.html` into a folder, each atomically; returns their paths."""
    facts = {
        "title": f"{result['name']}: {' or '.join(model['label'] for model in result['models'])}",
        "opening": opening(result), "headline": headline(result), "sentences": sentences(result),
        "pictures": [picture(result, label) for label in result["extremes"]], "tables": tables(result),
        "notes": notes(result), "command": command,
    }  # fmt: skip
    texts = {"ab.json": json.dumps(result, indent=1, ensure_ascii=False) + "\n"}
    texts |= {name: page(f"{name}.j2", facts) for name in ("ab.md", "ab.html")}
    return [write_atomic(Path(folder) / name, text) for name, text in texts.items()]


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader should know of the data, of the models and of the tests."""
    tests: Sequence[str] = [line["note"] for line in result["answers"] if line["note"]]
    models = [f"{model['label']}: {note}" for model in result["models"] for note in model["notes"]]
    return list(dict.fromkeys([*result["notes"], *models, *tests]))
