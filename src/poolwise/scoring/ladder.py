"""The dilution ladder: the baseline's own embeddings with noise in them, calibrated to lose .5, 1 and 2 points.

No training and no second pass through the base: the embeddings of a task are kept while it is scored, and each rung
adds Gaussian noise to them. The noise of a text depends on the text and the run's seed alone, so equal texts get equal
noise, scores are deterministic, and the rungs differ in the noise's length only.

How much noise loses how much is found on development items, never on the tasks: training pairs of the study, those
that the run has not been trained on first, read as a retrieval and as an STS task. What a rung loses on the tasks is
measured there, and may be more or less.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from poolwise.data import Pairs
from poolwise.encoding import KEPT_BYTES, sentence_vectors
from poolwise.reading.batches import Plan
from poolwise.study import Recipe
from poolwise.verdicts.rungs import RUNGS

Array = NDArray[np.float32]
DEV_PAIRS = 256
"""Training pairs that calibrate a ladder."""
DRAWS = 8
"""Draws of noise over which a loss on them is averaged."""
SHARES = (0.01, 3.0)
"""Smallest and largest length of the noise, as a share of the embedding's length."""
HALVINGS = 9
"""Of that range, on a logarithmic scale: to within 1.2 %."""


class Kept:
    """A sentence-transformers model that remembers what it has embedded; `whole` while all of it fits `KEPT_BYTES`."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.whole, self.bytes = encoder, True, 0
        self._known: dict[tuple[str | None, str, str], Array] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def kept_vectors(self, texts: Sequence[str], side: str | None, prompt: str, batch_size: int) -> Array:
        """(N, D) embeddings; a text that was asked for before is not encoded again, unless what it gives depends on the
        texts beside it."""
        if getattr(self.encoder, "by_batch", False):
            return sentence_vectors(self.encoder, texts, side, prompt, batch_size)
        new = [text for text in dict.fromkeys(texts) if (side, prompt, text) not in self._known]
        fresh = (
            dict(zip(new, sentence_vectors(self.encoder, new, side, prompt, batch_size), strict=True)) if new else {}
        )
        vectors = np.stack([fresh[text] if text in fresh else self._known[side, prompt, text] for text in texts])
        size = sum(vector.nbytes for vector in fresh.values())
        if self.bytes + size <= KEPT_BYTES:
            self._known.update({(side, prompt, text): vector for text, vector in fresh.items()})
            self.bytes += size
        else:
            self.whole = False
        return vectors


class Diluted:
    """A rung: the embeddings of `kept` with noise of `share` times their length."""

    def __init__(self, kept: Kept, share: float, seed: int) -> None:
        self.kept, self.share, self.seed = kept, share, seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kept, name)

    def kept_vectors(self, texts: Sequence[str], side: str | None, prompt: str, batch_size: int) -> Array:
        """(N, D), as long as the embeddings they are made of."""
        vectors = self.kept.kept_vectors(texts, side, prompt, batch_size)
        return dilute(vectors, np.stack([noise(text, self.seed, vectors.shape[1]) for text in texts]), self.share)


def noise(text: str, seed: int, width: int) -> Array:
    """(D,) Gaussian noise of expected length 1, a function of text and seed."""
    digest = hashlib.blake2b(f"{seed} {text}".encode(), digest_size=16).digest()
    generator = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    return generator.standard_normal(width, dtype=np.float32) / np.float32(width**0.5)


def dilute(vectors: Array, unit: Array, share: float) -> Array:
    """(N, D) `vectors` plus `unit` noise (N, D) of `share` times their length, brought back to their length."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    moved = vectors + share * length * unit
    found: Array = (moved * (length / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12))).astype(
        np.float32
    )
    return found


def calibrate(
    encoder: Any, recipe: Recipe, pairs: Pairs, plan: Plan, seed: int, batch_size: int = 32
) -> dict[str, Any]:
    """How much noise each rung takes, from development pairs of one run.

    Returns (JSON-able): `shares`, by label of the rung, None where no noise loses as much; `losses` on the development
    pairs at these; `score` without noise; `pairs`, and how many of them were `unseen` in training.
    """
    rows, unseen = development_rows(pairs, plan)
    table = pairs.dataset.select(rows.tolist(), keep_in_memory=True)
    queries, positives = list(table["query"]), list(table["positive"])
    # without hard negatives the next pair's positive serves
    others = list(table["negative_1"]) if recipe.negatives else [*positives[1:], *positives[:1]]
    documents = list(dict.fromkeys([*positives, *others]))
    place = {text: number for number, text in enumerate(documents)}
    right, wrong = (np.array([place[text] for text in texts]) for texts in (positives, others))
    q = sentence_vectors(encoder, queries, "query", recipe.query_prompt, batch_size)
    d = sentence_vectors(encoder, documents, "document", recipe.document_prompt, batch_size)
    full = development_score(q, d, right, wrong)

    def loss(share: float) -> float:
        lost = 0.0
        for draw in range(DRAWS):
            random = np.random.default_rng([seed, draw])
            units = [random.standard_normal(x.shape, dtype=np.float32) / np.float32(x.shape[1] ** 0.5) for x in (q, d)]
            lost += full - development_score(dilute(q, units[0], share), dilute(d, units[1], share), right, wrong)
        return lost / DRAWS

    shares: dict[str, float | None] = {}
    losses: dict[str, float] = {}
    low = SHARES[0]
    for label, target in RUNGS.items():
        shares[label] = None
        if loss(SHARES[1]) < target:
            continue
        below, above = low, SHARES[1]
        for _ in range(HALVINGS):
            middle = (below * above) ** 0.5
            below, above = (below, middle) if loss(middle) >= target else (middle, above)
        shares[label] = low = above
        losses[label] = loss(above)
    return {"shares": shares, "losses": losses, "score": full, "pairs": len(rows), "unseen": unseen}


def development_rows(pairs: Pairs, plan: Plan) -> tuple[NDArray[np.int64], int]:
    """Up to `DEV_PAIRS` rows of the training pairs in the order of their queries' hashes, those that the plan leaves
    out first; and how many of them it leaves out."""
    seen = np.isin(np.arange(len(pairs.rows)), plan.indices)
    chosen = np.lexsort((pairs.rows.exact[:, 1, 0], pairs.rows.exact[:, 0, 0], seen))[:DEV_PAIRS]
    return chosen, int((~seen[chosen]).sum())


def development_score(q: Array, d: Array, right: NDArray[Any], wrong: NDArray[Any]) -> float:
    """Mean of nDCG@10 (each query N among documents M, `right` the relevant one) and of Spearman's correlation between
    the cosines of 2 N pairs and whether they belong together (`right`) or not (`wrong`).

    q (N, D), d (M, D), right and wrong (N,) index documents.
    """
    q = q / np.maximum(np.linalg.norm(q, axis=1, keepdims=True), 1e-12)
    d = d / np.maximum(np.linalg.norm(d, axis=1, keepdims=True), 1e-12)
    cosines = q @ d.T
    rows = np.arange(len(q))
    own = cosines[rows, right]
    rank = 1 + (cosines > own[:, None]).sum(axis=1)
    gain = np.where(rank <= 10, 1 / np.log2(1 + rank), 0.0).mean()
    ranks = rankdata(np.concatenate([own, cosines[rows, wrong]]))
    together = np.repeat([1.0, -1.0], len(q))
    spread = ranks.std()
    agreement = float(((ranks - ranks.mean()) * together).mean() / spread) if spread else 0.0
    return (float(gain) + agreement) / 2
