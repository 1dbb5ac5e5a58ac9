"""Built-in tasks by mechanism: their unit is the mechanism, over seeds and items, never the task type.

Ten tasks from one grammar are one task, so tasks named `demo/<mechanism>-<form>` are grouped by mechanism whatever a
comparison groups by, and their items take the place of tasks:

| form | item | score |
|---|---|---|
| retrieval | meaning (its wordings averaged) | the main metric |
| classification | example | share of classifiers that are right |
| clustering | set | V-measure |
| STS | pair | its pseudo-value of Spearman's correlation, below |

The pseudo-value of pair i is rho + z_i w_i − rho (z_i² + w_i²) / 2, with z and w the standardised midranks of cosines
and gold values: Pearson's influence function on ranks (infinitesimal jackknife; Devlin, Gnanadesikan & Kettenring 1975)
plus rho. Its mean over the pairs is rho exactly, its spread over them gives rho's standard error for large n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from poolwise.demo import PREFIX

if TYPE_CHECKING:
    import polars as pl


ITEM = "#"
WORDINGS = 2
"""Queries of one meaning in a built-in retrieval task, numbered one after the other."""
RUN = ("design", "seed", "task")


def whole_task(name: str) -> str:
    """The task of an item: `demo/roles-sts#12` is of `demo/roles-sts`."""
    return name.partition(ITEM)[0] if name.startswith(PREFIX) else name


def by_mechanism(frame: pl.DataFrame, main: pl.DataFrame) -> pl.DataFrame:
    """`main` (rows of main scores, one checkpoint a run) with the columns `mechanism` and `is_item`.

    Main scores of built-in tasks become rows of their items, each a task of its own, where all of them have items in
    `frame` (the long table); else they stay main scores. Other tasks keep their rows; their `mechanism` is null.
    """
    import polars as pl

    name = pl.col("task").str.strip_prefix(PREFIX).str.extract(r"^(.*)-[^-]*$").fill_null(pl.col("task"))
    built_in = pl.col("task").str.starts_with(PREFIX)
    main = main.with_columns(pl.when(built_in).then(name).alias("mechanism"), pl.lit(False).alias("is_item"))
    ours = main.filter(built_in)
    if ours.is_empty():
        return main
    keys = ours.select(*RUN, "step", "mechanism", metric_main="metric", score_main="score")
    rows = frame.filter(pl.col("item_id").is_not_null() & built_in).join(keys, on=[*RUN, "step"], nulls_equal=True)
    if rows.select(RUN).n_unique() < ours.select(RUN).n_unique() or "gold" not in rows.columns:
        return main
    pairs, others = rows.filter(pl.col("metric") == "cosine"), rows.filter(pl.col("metric") == pl.col("metric_main"))
    queries = pl.col("item_id").str.strip_prefix("q").cast(pl.Int64, strict=False) // WORDINGS
    meaning = pl.when(pl.col("task_type") == "Retrieval").then(pl.format("meaning {}", queries))
    items = pl.concat(
        [_pseudo_values(pairs), others.with_columns(meaning.fill_null(pl.col("item_id")).alias("item_id"))]
    )
    label = pl.concat_str("task", pl.lit(ITEM), "item_id")
    kept = [column for column in main.columns if column not in ("score", "item_id", "is_item", "metric", "source")]
    items = items.with_columns(label.alias("task"), label.alias("source"), pl.col("metric_main").alias("metric"))
    by = [column for column in kept if column in RUN or column in ("step", "task_type", "split", "subset", "mechanism")]
    items = items.group_by(*by, "metric", "source").agg(pl.col("score").mean()).with_columns(is_item=pl.lit(True))
    return pl.concat([main.filter(~built_in), items], how="diagonal_relaxed")


def _pseudo_values(pairs: pl.DataFrame) -> pl.DataFrame:
    """STS pairs with their pseudo-values as scores; 0 where the task scored 0, all cosines being alike."""
    import polars as pl

    def standard(column: str) -> pl.Expr:
        rank = pl.col(column).rank("average").over(RUN)
        return (rank - rank.mean().over(RUN)) / rank.std(ddof=0).over(RUN)

    z, w = pl.col("_z"), pl.col("_w")
    pairs = pairs.with_columns(standard("score").alias("_z"), standard("gold").alias("_w"))
    pairs = pairs.with_columns((z * w).mean().over(RUN).alias("_rho"))
    value = pl.col("_rho") + z * w - pl.col("_rho") * (z**2 + w**2) / 2
    alike = (pl.col("score_main") == 0) | value.is_nan()
    return pairs.with_columns(pl.when(alike).then(0.0).otherwise(value).alias("score")).drop("_z", "_w", "_rho")
