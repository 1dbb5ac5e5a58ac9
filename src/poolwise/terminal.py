"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

PIPE_WIDTH = 140


def terminal(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; a file or a pipe gets `PIPE_WIDTH` columns at least."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console
