"""Reference rows and the dilution ladder: what no training buys, and what a known loss looks like."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sparse
import sklearn
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer, TfidfVectorizer
from sklearn.random_projection import SparseRandomProjection

from poolwise.data.batches import Plan
from poolwise.data.pairs import Pairs
from poolwise.encoding.encode import top
from poolwise.encoding.fast import KEPT_BYTES, sentence_vectors
from poolwise.encoding.shortcuts import VectorCache
from poolwise.model.checkpoint import load_named
from poolwise.scoring.adapters import PublishedBatches
from poolwise.study.recipe import Recipe
from poolwise.verdicts.controls import RUNGS

DENSE_LIMIT = 2**27
"""Numbers in the dense rows of one task (half a gigabyte in fp32); beyond it `encode_dense` approximates."""
DENSE_SIZE = 2048
DEPTH = 1000
"""Documents that are ranked for each query, as in mteb."""
MEASURES = {
    "ndcg_at_10": "ndcg_cut_10", "recall_at_10": "recall_10", "recall_at_100": "recall_100", "mrr": "recip_rank",
    "map": "map_cut_1000",
}  # fmt: skip
"""Metric -> what trec_eval calls it; the first decides."""
_WORD = re.compile(r"(?u)\b\w+\b")


class Tfidf:
    """TF-IDF vectors of unit length: (1 + ln tf) · (ln((1 + N) / (1 + df)) + 1), as scikit-learn defines it.

    `words`: lower-cased words. `chars`: 3 to 5 characters within word boundaries, which see inflections and typing
    errors too.
    """

    def __init__(self, unit: str):
        self.name = "tfidf" if unit == "words" else "tfidf_chars"
        self.identity = f"{self.name}, scikit-learn {sklearn.__version__}"
        self._vectorizer = (
            TfidfVectorizer(token_pattern=_WORD.pattern, sublinear_tf=True, dtype=np.float32)
            if unit == "words"
            else TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, dtype=np.float32)
        )

    def prepare(self, texts: Iterable[str]) -> None:
        """Fit vocabulary and document frequencies on a task's texts, each different text counted once."""
        different = dict.fromkeys(texts)
        self._vectorizer.fit(different)
        self._exact = len(different) * len(self._vectorizer.vocabulary_) <= DENSE_LIMIT

    def encode(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """(B, V) sparse rows of unit length; a text without a known unit is a row of zeros."""
        return sparse.csr_matrix(self._vectorizer.transform(texts))

    def encode_dense(self, texts: Sequence[str]) -> np.ndarray:
        """`encode` as a dense fp32 matrix. Where a task's texts × vocabulary exceed `DENSE_LIMIT`, rows are folded to
        2,048 numbers by a seeded sparse random projection (Achlioptas 2003; standard deviation of a cosine .02).
        """
        rows = self.encode(texts)
        if not self._exact:
            rows = SparseRandomProjection(DENSE_SIZE, random_state=0).fit(rows).transform(rows)
        return rows.toarray()

    def index(self, documents: Sequence[str]) -> None:
        """The documents that `search` goes through."""
        self.by_word = sparse.csr_matrix(self.encode(documents).T)

    def search(self, queries: Sequence[str]) -> sparse.csr_matrix:
        """(Q, N) cosine of every query with every document of the index."""
        return (self.encode(queries) @ self.by_word).tocsr()

    def rank(self, queries: Sequence[str], documents: Sequence[str]) -> sparse.csr_matrix:
        """(Q, N) cosine of every query with every document."""
        self.index(documents)
        return self.search(queries)


class Bm25:
    """BM25 (Robertson & Zaragoza 2009, with Lucene's idf, which is never negative):

        sum over the query's words of ln(1 + (N - df + .5) / (df + .5)) · tf / (tf + k1 · (1 - b + b · length / mean))

    over lower-cased words of two or more characters, English stop words out, plurals folded (Harman's S stemmer, 1991).
    It ranks only: `task_types` says where it applies. Frequencies come from the documents that are searched.

    With the words of mteb's `baseline-bm25s` (33 stop words, Snowball stemmer; needs bm25s and PyStemmer) the scores
    are mteb's, nDCG@10 on Cranfield, SciFact, CISI, NPL .3824, .6863, .3956, .4280; with these words, which need
    nothing, .3777, .6702, .4014, .4022.
    """

    name = "bm25"
    task_types = ("Retrieval", "Reranking")

    def __init__(self, k1: float = 1.5, b: float = 0.75):
        self.k1, self.b = k1, b
        self.identity = f"bm25 k1={k1} b={b}, scikit-learn {sklearn.__version__}"

    def index(self, documents: Sequence[str]) -> None:
        """The documents that `search` goes through, from which frequencies come."""
        self._vectorizer = CountVectorizer(analyzer=content_words, dtype=np.float64)
        counts = sparse.coo_matrix(self._vectorizer.fit_transform(documents))
        lengths = np.bincount(counts.row, counts.data, minlength=len(documents))
        df = np.bincount(counts.col, minlength=counts.shape[1])
        idf = np.log1p((len(documents) - df + 0.5) / (df + 0.5))
        saturation = self.k1 * (1 - self.b + self.b * lengths / lengths.mean())
        weights = idf[counts.col] * counts.data / (counts.data + saturation[counts.row])
        self.by_word = sparse.csr_matrix((weights, (counts.col, counts.row)), shape=counts.shape[::-1])

    def search(self, queries: Sequence[str]) -> sparse.csr_matrix:
        """(Q, N) score of every document of the index; a word that a query repeats counts as often."""
        return (sparse.csr_matrix(self._vectorizer.transform(queries)) @ self.by_word).tocsr()

    def rank(self, queries: Sequence[str], documents: Sequence[str]) -> sparse.csr_matrix:
        """(Q, N) score of every document for every query."""
        self.index(documents)
        return self.search(queries)


def search_words(model: Any, texts: Sequence[str], depth: int, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `encoding.encode.search`, by an indexed lexical reference; documents without a word of the query get 0."""
    depth = min(depth, len(rank))
    places, scores = np.zeros((len(texts), depth), np.int64), np.zeros((len(texts), depth), np.float32)
    for low in range(0, len(texts), 64):
        rows = model.search(texts[low : low + 64])
        for row in range(rows.shape[0]):
            dense = np.asarray(rows[[row]].toarray().ravel(), np.float32)
            places[low + row], scores[low + row] = top(np.arange(len(dense)), dense, depth, rank)
    return places, scores


def measured(
    ids: Sequence[str], relevant: Mapping[str, Mapping[str, int]], queries: Sequence[str], places: np.ndarray,
    scores: np.ndarray, without_itself: bool = False,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Metric -> (Q,) trec_eval's value for each query.

    Args:
        ids: of the documents. relevant: query -> document -> grade. queries: ids of the Q queries.
        places, scores: (Q, K) the documents that were found for each query, as indices into `ids`, and their scores.
        without_itself: leave out the document with the id of the query.
    """
    import pytrec_eval

    found = {metric: np.zeros(len(queries)) for metric in MEASURES}
    wanted = {"ndcg_cut.10", "recall.10,100", "recip_rank", f"map_cut.{DEPTH}"}
    for row, query in enumerate(queries):
        ranked = {ids[place]: float(score) for place, score in zip(places[row], scores[row], strict=True)}
        if without_itself:
            ranked.pop(query, None)
        values = pytrec_eval.RelevanceEvaluator({query: relevant[query]}, wanted).evaluate({query: ranked})[query]
        for metric, name in MEASURES.items():
            found[metric][row] = values[name]
    return found


def content_words(text: str) -> list[str]:
    """Lower-cased words without stop words and single characters, plurals folded."""
    words = _WORD.findall(text.lower())
    return [_singular(word) for word in words if len(word) > 1 and word not in ENGLISH_STOP_WORDS]


def _singular(word: str) -> str:
    """Harman's S stemmer: the first rule that applies; an exception leaves its rule aside."""
    if len(word) > 3 and word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("us", "ss")):
        return word[:-1]
    return word


def reference(name: str) -> Any:
    """`tfidf`, `tfidf_chars`, `bm25`, or a sentence-transformers model by Hub name or folder.

    Raises `ModelError` if there is no such model.
    """
    if name in ("tfidf", "tfidf_chars"):
        return Tfidf("words" if name == "tfidf" else "chars")
    if name == "bm25":
        return Bm25()
    return load_named(name)


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
    """A sentence-transformers model that remembers what it has embedded, up to `KEPT_BYTES`."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.cache = encoder, VectorCache(KEPT_BYTES)

    @property
    def whole(self) -> bool:
        """Whether everything asked for so far fitted."""
        return self.cache.whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def kept_vectors(self, texts: Sequence[str], side: str | None, prompt: str, batch_size: int) -> Array:
        """(N, D) embeddings. A text is encoded once, unless its embedding depends on the other texts of its batch."""
        if isinstance(self.encoder, PublishedBatches):
            return self.encoder.kept_vectors(texts, side, prompt, batch_size)
        return self.cache.get(
            texts, side, prompt, lambda new: sentence_vectors(self.encoder, new, side, prompt, batch_size)
        )


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
