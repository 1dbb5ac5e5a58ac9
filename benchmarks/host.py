"""The host's work in an encode: texts a second of one core, the decoder free of cost.

`host_rows`: 8,192 texts (mean 40 tokens) through `FastEncoder.encode` with packs of 32,768 tokens, as on a GPU: the
tokenizer, sorting, laying out, pooling. Against another version of the project, whose worktree `BESIDE` names,

    BESIDE=../old python -m benchmarks host

processes of both versions in turn; their embeddings, which hold each text's last token and position, must be equal.
Without `BESIDE` the figure is texts a second alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

TEXTS, BUDGET, WIDTH = 8192, 32768, 16
ROUNDS, REPEATS = 3, 3
GOAL = 2.3


def run() -> list[dict[str, Any]]:
    import numpy as np

    from benchmarks.measure import ratio_record, record

    trees = {"ours": Path(__file__).parents[1]}
    if os.environ.get("BESIDE"):
        trees["beside"] = Path(os.environ["BESIDE"]).resolve()
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for name, tree in trees.items():
                seconds[name].append(_measured(tree, Path(folder) / f"{name}.npy"))
        vectors = {name: np.load(Path(folder) / f"{name}.npy") for name in trees}
    rate = TEXTS / statistics.median(seconds["ours"])
    if "beside" not in trees:
        rates = [TEXTS / each for each in seconds["ours"]]
        return [record("host_rows", rate, min(rates), max(rates), None, unit="texts a second of one core")]
    apart = float(np.abs(vectors["ours"] - vectors["beside"]).max())
    return [
        ratio_record(
            "host_rows", seconds["beside"], seconds["ours"], GOAL, agreement=apart,
            agreement_of="largest difference of a number of an embedding", texts_per_second=round(rate),
            beside_texts_per_second=round(TEXTS / statistics.median(seconds["beside"])),
        )
    ]  # fmt: skip


def _measured(tree: Path, vectors: Path) -> float:
    """CPU seconds of one encode, in a process of its own with the code of `tree`."""
    paths = os.pathsep.join([str(tree / "src"), str(tree)])
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, str(vectors)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure(vectors: Path) -> float:
    """The median of a few encodes. Only names that earlier versions have too."""
    import numpy as np
    import torch

    from benchmarks.corpus import Corpus
    from poolwise import FastEncoder

    torch.set_num_threads(1)
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 1}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(folder), "float32", "cpu", sizes={**sizes, "num_key_value_heads": 1})
    tokens = (corpus.tokenizer.decode([number]) for number in range(len(corpus.tokenizer)))
    words = [token[1:] for token in tokens if token[:1] == " " and token[1:].isalpha()]
    corpus.words = [word for word in words if len(corpus.tokenizer(" " + word)["input_ids"]) == corpus.special + 1]
    texts = list(dict.fromkeys(corpus.text(int(length)) for length in corpus.lengths(TEXTS)))
    fast = FastEncoder(corpus.encoder, budget=BUDGET, compiled=False)
    fast.layout, fast.prunes = "packed", False

    def free(input_ids: Any, position_ids: Any, segments: Any, **_: Any) -> Any:
        segments.calls = 1
        states = torch.zeros(*input_ids.shape, WIDTH)
        states[..., 0], states[..., 1] = input_ids, position_ids
        return types.SimpleNamespace(last_hidden_state=states)

    fast.backbone.model.forward = free
    np.save(vectors, fast.encode(texts))
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        fast.encode(texts)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds) * TEXTS / len(texts)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
