"""Tables on a terminal, and the end of a demo there: the answer, the means, the predictions and the controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from poolwise.reporting import controls_report, tables
from poolwise.reporting.summary import designs, summary
from poolwise.terminal import terminal
from poolwise.verdicts.comparison import Comparison

if TYPE_CHECKING:
    from rich.console import Console


def print_table(console: Console, table: tables.Table) -> None:
    """A table in aligned columns, never cut and never wrapped."""
    from rich.text import Text

    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    words = [index < table.text or name == "Verdict" for index, name in enumerate(table.columns)]

    def line(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), no_wrap=True, overflow="ignore", crop=False)

    def cells(row: Sequence[str]) -> str:
        padded = zip(row, widths, words, strict=True)
        return "  ".join(cell.ljust(width) if word else cell.rjust(width) for cell, width, word in padded).rstrip()

    line()
    line((table.title, "bold"))
    line((cells(table.columns), "dim"))
    for heading, rows in table.sections:
        if heading:
            line((heading, "italic"))
        for row in rows:
            line(cells(row))
    if table.note:
        console.print(Text(table.note, style="dim"))


def show_end(opening: str, comparison: Comparison, predictions: Any, console: Console | None = None) -> None:
    """What `poolwise demo` ends with; every number behind it is in the report."""
    from rich.text import Text

    console = console or terminal()
    roles = dict(comparison.roles)
    console.print()
    console.print(Text(opening))
    if told := designs(comparison):
        console.print(Text(told, style="dim"))
    console.print()
    console.print(Text(summary(comparison, predictions), style="bold"))
    for alarm in controls_report.alarms(comparison, roles):
        console.print(Text(alarm, style="bold yellow"))
    print_table(console, tables.means(comparison))
    if found := controls_report.predictions_table(comparison, predictions):
        print_table(console, found)
    console.print()
    for said in controls_report.sentences(comparison):
        console.print(Text(said))
    for note in (*comparison.notes, *comparison.excluded):
        console.print(Text(note, style="yellow"))
    console.print()
