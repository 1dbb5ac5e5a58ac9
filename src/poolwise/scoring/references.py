"""Reference rows: what no training buys. TF-IDF, BM25, and any sentence-transformers model by name.

The lexical ones know nothing but the task's own texts, without labels: `prepare` fits vocabulary and document
frequencies on them. Everything is computed on sparse rows, exactly; `Tfidf.encode_dense` is the one approximation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sparse
import sklearn
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer, TfidfVectorizer
from sklearn.random_projection import SparseRandomProjection

from poolwise.decoder.hub import cached_if_unreachable
from poolwise.errors import ModelError, suggest

LEXICAL = ("tfidf", "tfidf_chars", "bm25")
DENSE_LIMIT = 2**27
"""Numbers in the dense rows of one task (half a gigabyte in fp32); beyond it `encode_dense` approximates."""
DENSE_SIZE = 2048
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

    def rank(self, queries: Sequence[str], documents: Sequence[str]) -> sparse.csr_matrix:
        """(Q, N) cosine of every query with every document."""
        return (self.encode(queries) @ self.encode(documents).T).tocsr()


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

    def rank(self, queries: Sequence[str], documents: Sequence[str]) -> sparse.csr_matrix:
        """(Q, N) score of every document for every query; a word that a query repeats counts as often."""
        vectorizer = CountVectorizer(analyzer=content_words, dtype=np.float64)
        counts = sparse.coo_matrix(vectorizer.fit_transform(documents))
        lengths = np.bincount(counts.row, counts.data, minlength=len(documents))
        df = np.bincount(counts.col, minlength=counts.shape[1])
        idf = np.log1p((len(documents) - df + 0.5) / (df + 0.5))
        saturation = self.k1 * (1 - self.b + self.b * lengths / lengths.mean())
        weights = idf[counts.col] * counts.data / (counts.data + saturation[counts.row])
        by_word = sparse.csr_matrix((weights, (counts.col, counts.row)), shape=counts.shape[::-1])
        return (sparse.csr_matrix(vectorizer.transform(queries)) @ by_word).tocsr()


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

    Raises `ModelError` where there is no such model.
    """
    if name in ("tfidf", "tfidf_chars"):
        return Tfidf("words" if name == "tfidf" else "chars")
    if name == "bm25":
        return Bm25()
    from sentence_transformers import SentenceTransformer

    try:
        with cached_if_unreachable(name):
            return SentenceTransformer(name)
    except Exception as error:  # whatever a hub client, a config or a weight file may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"model {name!r} cannot be loaded: {reason} (allowed: {', '.join(LEXICAL)}, a sentence-transformers "
            f"model's folder, or its name on a Hub that this machine can reach){suggest(name, LEXICAL)}"
        ) from error
