"""Which official tasks were made from one set of texts: what one origin says twice is no independent evidence.

Tasks of one origin are averaged before designs are compared. The table names what mteb's tasks share; a column `source`
in a table of scores overrides it, and a task that it does not know is its own source. The first pattern that a name
begins with counts.

| origin | tasks | why |
|---|---|---|
| semeval-sts | STS12 to STS17, STSBenchmark | one yearly campaign; STSBenchmark is drawn from the others' pairs |
| sts22-news | STS22 | news articles of the same campaign's later round |
| sick | SICK-R | image captions |
| arxiv, biorxiv, medrxiv, reddit | …P2P and …S2S, their versions | one site |
| stackexchange | StackExchange…, StackOverflow…, AskUbuntu…, CQADupstack… | one site |
| amazon-reviews, massive, mtop | Amazon…, Massive…, MTOP… | one collection, several labels |
| twitter | Twitter…, Tweet…, Emotion | one site |
| wikipedia | FEVER, ClimateFEVER, HotpotQA, DBPedia, NQ | passages of Wikipedia as the corpus |
| touche, scidocs | Touche2020 and its versions; SCIDOCS, SciDocsRR | one collection |
| twentynewsgroups | TwentyNewsgroups and its versions | one collection |
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

TASK_TYPES = (
    "BitextMining", "Classification", "Clustering", "InstructionReranking", "InstructionRetrieval",
    "MultilabelClassification", "PairClassification", "Reranking", "Retrieval", "STS", "Summarization",
)  # fmt: skip
"""mteb's words for the types of text tasks."""
ORIGINS: tuple[tuple[str, str], ...] = (
    (r"STS22", "sts22-news"),
    (r"STS1[2-7]|STSBenchmark", "semeval-sts"),
    (r"SICK-R", "sick"),
    (r"Ar[xX]iv", "arxiv"),
    (r"Biorxiv", "biorxiv"),
    (r"Medrxiv", "medrxiv"),
    (r"Reddit", "reddit"),
    (r"StackExchange|StackOverflow|AskUbuntu|CQADupstack", "stackexchange"),
    (r"Amazon", "amazon-reviews"),
    (r"Massive", "massive"),
    (r"MTOP", "mtop"),
    (r"Twitter|Tweet|Emotion", "twitter"),
    (r"FEVER|ClimateFEVER|HotpotQA|DBPedia|NQ", "wikipedia"),
    (r"Touche2020", "touche"),
    (r"SCIDOCS|SciDocs", "scidocs"),
    (r"TwentyNewsgroups", "twentynewsgroups"),
)
"""(regular expression that a task's name begins with, origin)."""


def origin(task: str) -> str | None:
    """The origin that an official task shares with others; None where the table knows none.

    A pattern ends at the end of a word: `STS12` is known, `STS120` and `NQueens` are not.
    """
    found = (name for pattern, name in ORIGINS if re.match(rf"(?:{pattern})(?![a-z0-9])", task))
    return next(found, None)


def with_origins(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Sources of official tasks filled in where the table has none, and a note of those that now share one."""
    import polars as pl

    bare = frame.filter(pl.col("source").is_null())["task"].unique().to_list()
    known = {task: name for task in sorted(bare) if (name := origin(task))}
    if not known:
        return frame, []
    filled = pl.col("source").fill_null(pl.col("task").replace_strict(known, default=None, return_dtype=pl.String))
    shared = [
        f"{', '.join(tasks)} ({name})"
        for name in dict.fromkeys(known.values())
        if len(tasks := [task for task in known if known[task] == name]) > 1
    ]
    said = f"Averaged as one source each, by mteb's names (a column `source` overrides it): {'; '.join(shared)}."
    return frame.with_columns(filled), [said] if shared else []
