"""Score the `m4` trials of studies/padding.toml with padding masked and attended to, as a table for `poolwise compare`.

    python scripts/padding.py runs/padding studies/padding.toml scores.csv --seeds 0 1 2 --sets 2

`m4` and `m4-padded` of that study have equal weights, so its masked arm alone has to be trained. `--sets`: how many of
the sets of each clustering task are used (mteb's sets overlap, and in padded batches no embedding can be reused). Done
seeds and tasks are kept if the table exists.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from poolwise.data.tasks import resolve_tasks
from poolwise.encoding.fast import FastEncoder
from poolwise.model import checkpoint
from poolwise.scoring.adapters import PublishedBatches
from poolwise.scoring.evaluate import evaluate
from poolwise.study.study import Study

COLUMNS = ("design", "seed", "task", "task_type", "metric", "score")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("study", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sets", type=int, default=2)
    given = parser.parse_args()
    study = Study.load(given.study)
    tasks = resolve_tasks(study.tasks, study.base_dir)
    for task in tasks:
        task.load()
        if task.task_type == "Clustering":
            for split in task.splits:
                rows = task.mteb.dataset[split]
                task.mteb.dataset[split] = rows.select(range(min(given.sets, len(rows))))
        task.mteb.unload_data = lambda: None  # the cut must outlive the first evaluation
    known = set()
    if given.table.exists():
        with given.table.open(encoding="utf-8") as file:
            known = {(row["design"], int(row["seed"]), row["task"]) for row in csv.DictReader(file)}
    else:
        given.table.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    for seed in given.seeds:
        (folder,) = given.runs.glob(f"trials/m4-s{seed}-*")
        fast = FastEncoder(checkpoint.load_any(folder))
        for task in tasks:
            for design, model in (("m4", fast), ("m4-padded", PublishedBatches(fast, task.task_type))):
                if (design, seed, task.name) in known:
                    continue
                rows = evaluate(model, [task], identity=f"{folder.name}-{design}", items=False)
                with given.table.open("a", encoding="utf-8") as file:
                    for row in rows:
                        values = {**row, "design": design, "seed": seed}
                        file.write(",".join(str(values[name]) for name in COLUMNS) + "\n")


if __name__ == "__main__":
    main()
