"""`poolwise ab`: models compared on one data set of the user's, from its files to a decision.

The data are an own retrieval folder, or pairs (STS, pair classification) or labelled texts as a folder or one file.
The corpus is streamed, embeddings are kept on disk by content and the search is exact, block by block, so that memory
does not grow with the corpus (lexical models keep its words in memory).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from poolwise import stats
from poolwise.data.own_tasks import MTEB_TYPES, Reader
from poolwise.data.reading import task_folders
from poolwise.data.survey import FOLDS, SearchData, TextData
from poolwise.encoding.encode import finite, keep_vectors, latency, lengths, open_encoder, prompt_of, search, unit
from poolwise.encoding.fast import FastEncoder
from poolwise.errors import CheckpointError, PoolwiseError, StatisticsError, TaskError, enumerate_words, suggest
from poolwise.files import user_path
from poolwise.model.checkpoint import recipe_of
from poolwise.runs import layout
from poolwise.runs.run import started, trials
from poolwise.scoring.evaluate import model_identity
from poolwise.scoring.references import DEPTH, MEASURES, content_words, measured, reference, search_words
from poolwise.study.catalogue import LEXICAL
from poolwise.study.study import Study
from poolwise.verdicts.items import Answer, DataSet, answers, compare_items, data_sets, decision, score
from poolwise.verdicts.table import table

KEPT = ".poolwise"
"""Folder of the kept embeddings, beside the data."""
EXTREMES = 20
"""Gains and losses that are shown with their texts."""
Say = Callable[[str], None]


@dataclass
class Contender:
    """One of the models: its label, and each of its runs with what opens it."""

    label: str
    runs: list[tuple[int, Path | str]]
    speed: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def open(self, number: int, dtype: str | None) -> Any:
        """A lexical reference, or a `FastEncoder`."""
        name = self.runs[number][1]
        if str(name) in LEXICAL:
            return reference(str(name))
        encoder = open_encoder(name, dtype)
        if recipe := recipe_of(encoder):
            encoder.max_seq_length = recipe.scored_length
        return FastEncoder(encoder)


def contenders(names: Sequence[str]) -> list[Contender]:
    """The models behind `names`; the same name twice gets two labels. `STUDY.toml:DESIGN` has a run for each seed.

    Raises PoolwiseError: fewer than two, a design that is unknown or has no trained run.
    """
    if len(names) < 2:
        raise PoolwiseError(
            "ab compares two models or more: poolwise ab DATA MODEL_A MODEL_B; the first is the one in use"
        )
    found: list[Contender] = []
    known: dict[tuple[str, str], str] = {}  # (folder or name, design of a study) -> label
    for name in names:
        path, _, design = name.rpartition(":") if ".toml:" in name else ("", "", "")
        runs = _runs_of(Study.load(path), design) if path else [(0, name)]
        label = design if path else Path(name).name if name.startswith((".", "/", "~")) else name
        number = sum(each.label.partition(" #")[0] == label for each in found)
        entry = Contender(f"{label} #{number + 1}" if number else label, [(s, p) for s, p in runs])
        place = Path(path or name).expanduser()
        first = known.setdefault((str(place.resolve()) if place.exists() else name, design), entry.label)
        if first != entry.label:
            entry.notes.append(f"the same model as {first}, given twice: the two can only score alike")
        found.append(entry)
    return found


def _runs_of(study: Study, design: str) -> list[tuple[int, Path | str]]:
    study.design(design)
    rows = trials(study) if started(study) else []
    rows = [row for row in rows if (row["label"], row["role"], row["base"]) == (design, "design", study.bases[0])]
    runs = [
        (row["seed"], layout.milestone(layout.trial(study.folder, row["name"]), study.recipe.steps)) for row in rows
    ]
    trained: list[tuple[int, Path | str]] = [(seed, path) for seed, path in runs if path.exists()]
    if not trained:
        raise CheckpointError(
            f"{design} of study {study.name} has no trained run in {study.folder}; run the study first"
        )
    return trained


Scores = dict[str, np.ndarray]
"""Metric -> (items,) scores of one run; for pairs `cosine` -> the model's cosines."""


def ab(
    data: str | Path,
    models: Sequence[str],
    *,
    margin: float = 0.01,
    dtype: str | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Compare models on one data set: the first is the one in use, the others may replace it.

    Args:
        data: a retrieval folder, or pairs or labelled texts in a folder or a file.
        models: folders, names on a Hub, `tfidf`, `bm25`, or `STUDY.toml:DESIGN` (all its seeds).
        margin: the smallest difference of the main metric that matters, 0–1.
        dtype: as in `encoding.encode.open_encoder`.
        cache: folder of the kept embeddings; by default `.poolwise` beside the data.
        seed: of the resampling.
        say: receives lines of progress.

    Returns what `poolwise ab --json` prints (docs/own-data.md).
    Raises PoolwiseError and its kinds: data, a model or a design that cannot be used.
    """
    path = user_path(data)
    if not path.exists():
        near = suggest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise TaskError(f"{path}: no such file or folder{near}")
    if not 0 < margin < 1:
        raise StatisticsError(f"margin = {margin}: a difference of scores above 0 and below 1 (1 point is .01)")
    entries = contenders(models)
    for line in [f"note: {entry.label}: {note}" for entry in entries for note in entry.notes]:
        say(line)
    if path.is_dir() and not any(file.is_file() for file in path.iterdir()) and (inside := task_folders(path)):
        raise TaskError(
            f"{path} holds the tasks {enumerate_words(inside)}; ab compares models on one of them: "
            f"poolwise ab {path / inside[0]} {' '.join(models)}"
        )
    searched = path.is_dir() and (Reader(path).find("corpus") or Reader(path).find("queries"))
    found = SearchData(path) if searched else TextData(path)
    if "bm25" in models and found.kind != "retrieval":
        raise TaskError(
            f"bm25 ranks documents for queries, it has no similarity of texts for {found.kind}; leave it out"
        )
    for note in found.notes:
        say(f"note: {note}")
    folder = Path(cache) if cache else (path if path.is_dir() else path.parent) / KEPT
    work = _Search(found, folder, dtype, say) if isinstance(found, SearchData) else _Texts(found, folder, dtype, say)
    scores = {entry.label: [work.run(entry, number) for number in range(len(entry.runs))] for entry in entries}
    return _described(path, found, work, entries, scores, margin, seed)


class _Work:
    """What a run of a model on data needs; subclasses score it."""

    def __init__(self, folder: Path, dtype: str | None, say: Say) -> None:
        self.folder, self.dtype, self.say = folder, dtype, say

    def keep(self, fast: FastEncoder, identity: str, texts: Callable[[], Iterable[str]], total: int, content: str,
             side: str | None, name: str) -> Any:  # fmt: skip
        return keep_vectors(fast, identity, texts, total, content, self.folder, side=side, name=name, say=self.say)


class _Search(_Work):
    """Retrieval: index, search, trec_eval's measures."""

    def __init__(self, data: SearchData, folder: Path, dtype: str | None, say: Say) -> None:
        super().__init__(folder, dtype, say)
        self.data, self.items = data, list(data.queries)
        self.best: dict[str, np.ndarray] = {}  # label -> (queries,) the first document of its first run

    def run(self, entry: Contender, number: int) -> Scores:
        """The measures of each query for one run."""
        data, model = self.data, entry.open(number, self.dtype)
        texts, depth = list(data.queries.values()), min(DEPTH + data.without_itself, len(data.ids))
        if isinstance(model, FastEncoder):
            identity = model_identity(model.given)
            self.say(f"{entry.label}: {len(data.ids):,} documents, {len(texts):,} queries")
            kept = self.keep(model, identity, data.documents, len(data.ids), data.content, "document", "documents")
            digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
            asked = self.keep(model, identity, lambda: texts, len(texts), digest, "query", "queries")
            cosine = str(getattr(model.given, "similarity_fn_name", "cosine")) != "dot"
            norms = lengths(kept.vectors) if cosine else None
            places, found = search(asked.vectors, kept.vectors, depth, data.rank, norms)

            def ask(text: str) -> None:
                vector = model.encode([text], prompt_of(model, None, "query"), side="query")
                search(vector, kept.vectors, 10, data.rank, norms)

            def encode(text: str) -> None:
                model.encode([text], prompt_of(model, None, "document"), side="document")

            one_by_one = latency(encode, self._some_documents()) if number == 0 else None
            size, seconds = kept.vectors.nbytes, kept.seconds
            entry.notes += [note for note in model.notes if note not in entry.notes]
        else:
            start = time.perf_counter()
            documents = list(data.documents())
            if hasattr(model, "prepare"):
                model.prepare([*texts, *documents])
            model.index(documents)
            seconds = time.perf_counter() - start
            places, found = search_words(model, texts, depth, data.rank)

            def ask(text: str) -> None:
                search_words(model, [text], 10, data.rank)

            one_by_one = None  # an index of words is made of all documents at once
            words = model.by_word
            size = words.data.nbytes + words.indices.nbytes + words.indptr.nbytes
        if number == 0:
            entry.speed = {
                "index_bytes": int(size), "index_seconds": round(seconds, 3),
                "index_texts_per_second": round(len(data.ids) / seconds, 1) if seconds else None,
                "index_ms": one_by_one,
                "query_ms": latency(ask, texts),
            }  # fmt: skip
            self.best[entry.label] = places[:, 0]
        return measured(self.data.ids, self.data.relevant, self.items, places, found, self.data.without_itself)

    def _some_documents(self) -> list[str]:
        return [text for text in self.data.judged.values() if text]

    def texts_of(self, row: int) -> dict[str, str]:
        """What is shown of a query: its text and one relevant document."""
        query = self.items[row]
        return {"query": self.data.queries[query], "answer": next(iter(self.data.answers(query)), "")}

    def first_documents(self, rows: Sequence[int], label: str) -> dict[int, str]:
        """The texts that a model puts first for some queries."""
        wanted = {int(self.best[label][row]) for row in rows}
        texts = {place: text for place, text in enumerate(self.data.documents()) if place in wanted} if wanted else {}
        return {row: texts[int(self.best[label][row])] for row in rows}

    def features(self) -> dict[str, np.ndarray]:
        """Feature -> (items,): words of the query, and the share of its content words that occur in an answer."""
        overlap = []
        for query, text in self.data.queries.items():
            words = set(content_words(text))
            known = {word for answer in self.data.answers(query) for word in content_words(answer)}
            overlap.append(len(words & known) / len(words) if words else 0.0)
        length = [len(text.split()) for text in self.data.queries.values()]
        return {"length": np.array(length, float), "overlap": np.array(overlap)}


class _Texts(_Work):
    """Pairs and labelled texts."""

    def __init__(self, data: TextData, folder: Path, dtype: str | None, say: Say) -> None:
        super().__init__(folder, dtype, say)
        self.data, self.items = data, [str(number) for number in range(len(data.rows))]

    def run(self, entry: Contender, number: int) -> Scores:
        """The cosine of each pair, or whether each text gets its label."""
        data, model = self.data, entry.open(number, self.dtype)
        rows = [*(data.train or []), *data.rows]
        texts = [row[column] for column in data.columns for row in rows]
        if isinstance(model, FastEncoder):
            digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
            kept = self.keep(model, model_identity(model.given), lambda: texts, len(texts), digest, None, "texts")
            vectors, seconds, prompt = kept.vectors, kept.seconds, prompt_of(model, None, None)
            entry.notes += [note for note in model.notes if note not in entry.notes]
        else:
            start, prompt = time.perf_counter(), ""
            model.prepare(texts)
            vectors = model.encode(texts)
            seconds = time.perf_counter() - start
        if number == 0:
            once = (lambda text: model.encode([text], prompt)) if prompt else (lambda text: model.encode([text]))
            size = vectors.nbytes if isinstance(vectors, np.ndarray) else vectors.data.nbytes + vectors.indices.nbytes
            entry.speed = {
                "index_bytes": int(size), "index_seconds": round(seconds, 3),
                "index_texts_per_second": round(len(texts) / seconds, 1) if seconds else None,
                "index_ms": latency(once, texts), "query_ms": None,
            }  # fmt: skip
        if data.kind == "classification":
            return {"accuracy": self._labelled(vectors, rows)}
        half = len(rows)
        if not isinstance(vectors, np.ndarray):
            return {"cosine": np.asarray(vectors[:half].multiply(vectors[half:]).sum(axis=1)).ravel()}
        return {"cosine": np.einsum("ij,ij->i", unit(vectors[:half]), unit(vectors[half:])).astype(float)}

    def _labelled(self, vectors: Any, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """(items,) 1 for a text whose label a logistic regression on the embeddings finds, as in mteb, else 0."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict

        labels, given = np.array([row["label"] for row in rows]), len(self.data.train or [])
        vectors = finite(np.asarray(vectors)) if isinstance(vectors, np.ndarray) else vectors
        classifier = LogisticRegression(max_iter=100, random_state=0)
        if given:
            guessed = classifier.fit(vectors[:given], labels[:given]).predict(vectors[given:])
        else:
            guessed = cross_val_predict(
                classifier, vectors, labels, cv=StratifiedKFold(FOLDS, shuffle=True, random_state=0)
            )
        return np.asarray(guessed == labels[given:], float)

    def texts_of(self, row: int) -> dict[str, str]:
        """What is shown of an item: its texts and its label or score."""
        found = self.data.rows[row]
        return {name: str(value) for name, value in found.items()}

    def first_documents(self, rows: Sequence[int], label: str) -> dict[int, str]:
        """Nothing: there is no ranking."""
        return {}

    def features(self) -> dict[str, np.ndarray]:
        """Feature -> (items,): words of the texts, and of pairs the share of the shorter one's words in the other."""
        sides = [[row[column] for row in self.data.rows] for column in self.data.columns]
        found = {
            "length": np.array([sum(map(len, map(str.split, texts))) for texts in zip(*sides, strict=True)], float)
        }
        if len(sides) == 2:
            words = [[set(content_words(text)) for text in side] for side in sides]
            found["overlap"] = np.array(
                [len(a & b) / min(len(a), len(b)) if a and b else 0.0 for a, b in zip(*words, strict=True)]
            )
        return found


def _described(
    path: Path, data: SearchData | TextData, work: _Search | _Texts, entries: Sequence[Contender],
    scores: Mapping[str, list[Scores]], margin: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The result in full, JSON-able."""
    task_type = MTEB_TYPES[data.kind][0]
    frame = _table(data.name, task_type, entries, scores, len(work.items), getattr(data, "rows", []))
    metrics = [*MEASURES] if data.kind == "retrieval" else list(scores[entries[0].label][0])
    base = entries[0].label
    sets = {metric: data_sets(frame, data.name, metric, "error")[0] for metric in metrics}
    lines = {
        metric: compare_items(frame, data.name, metric=metric, baseline=base, missing="error", seed=seed)
        for metric in metrics
    }
    found = answers(lines[metrics[0]], margin)
    # The decision is about designs if all were run twice or more, else about these models.
    designs = [each for each in found if each.line.scope.startswith("these two designs")]
    whole = designs if len(designs) == len(entries) - 1 else [each for each in found if each not in designs]
    main = sets[metrics[0]]
    apart = {e.label: main.per_item(e.label).mean(axis=0) - main.per_item(base).mean(axis=0) for e in entries[1:]}
    return {
        "data": str(path.resolve()), "name": data.name, "kind": data.kind, "items": len(work.items), "noun": data.noun,
        "documents": len(data.ids) if isinstance(data, SearchData) else None, "metric": main.metric, "margin": margin,
        "baseline": base, "decision": _answer(decision(whole)), "answers": [_answer(each) for each in found],
        "models": [
            {
                "label": entry.label, "runs": [{"seed": s, "model": str(model)} for s, model in entry.runs],
                "scores": {each.metric: _mean(each, entry.label, seed) for each in sets.values()}, **entry.speed,
                "notes": entry.notes,
            }
            for entry in entries
        ],
        "comparisons": [
            {**asdict(line), **_counts(sets[metric], base, line.design)} for metric in metrics for line in lines[metric]
        ],
        "extremes": {label: _extremes(work, main, base, label, values) for label, values in apart.items()},
        "by_feature": _by_feature(main, [entry.label for entry in entries], work.features()),
        "differences": {label: np.sort(values)[::-1].round(6).tolist() for label, values in apart.items()},
        "notes": list(data.notes),
    }  # fmt: skip


def _table(
    name: str, task_type: str, entries: Sequence[Contender], scores: Mapping[str, list[Scores]], items: int,
    rows: Sequence[Mapping[str, Any]],
) -> Any:  # fmt: skip
    """The long table of all item scores, with the gold value of each pair and the model of each run (two trainings may
    score alike). Items are numbered, so that they keep their order in a data set, which sorts them by id."""
    gold, numbers = [row.get("score", row.get("labels")) for row in rows], [f"{n:09}" for n in range(items)]
    of_task, found = {"task": name, "task_type": task_type}, []
    for entry in entries:
        for (seed, model), run in zip(entry.runs, scores[entry.label], strict=True):
            common = {**of_task, "design": entry.label, "seed": seed, "model_identity": str(model)}
            for metric, values in run.items():
                golds = gold if metric == "cosine" else [None] * items
                found += [
                    {**common, "metric": metric, "score": value, "item_id": item, "gold": truth}
                    for value, item, truth in zip(values.clip(-1, 1).tolist(), numbers, golds, strict=True)
                ]
    return table(found, name)


def _answer(answer: Answer) -> dict[str, Any]:
    return {"answer": answer.answer, "more": answer.more, **asdict(answer.line)}


def _mean(data: DataSet, label: str, seed: int) -> dict[str, Any]:
    """The mean over runs with its 95 % interval over items, and the score of each run."""
    values = data.per_item(label)
    whole = stats.paired_bootstrap(np.zeros(values.shape[1]), values.mean(axis=0), np.random.default_rng(seed))
    low = -1.0 if data.metric == "cosine_spearman" else 0.0  # the interval of few pairs may exceed what is possible
    return {
        "mean": float(values.mean()), "ci_low": max(low, whole.ci_low), "ci_high": min(1.0, whole.ci_high),
        "runs": values.mean(axis=1).tolist(),
    }  # fmt: skip


def _counts(data: DataSet, base: str, label: str) -> dict[str, int]:
    apart = data.per_item(label).mean(axis=0) - data.per_item(base).mean(axis=0)
    return stats.wins_ties_losses(apart)._asdict()


def _extremes(work: _Search | _Texts, data: DataSet, base: str, label: str, apart: np.ndarray) -> dict[str, Any]:
    """The largest gains and losses of a model, with their texts."""
    order = np.argsort(-apart, kind="stable")
    gains = [int(n) for n in order[:EXTREMES] if apart[n] > 0]
    losses = [int(n) for n in order[::-1][:EXTREMES] if apart[n] < 0]
    pairs = {name: data.per_item(name).mean(axis=0) for name in (base, label)}
    firsts = {name: work.first_documents([*gains, *losses], name) for name in pairs}

    def shown(row: int) -> dict[str, Any]:
        first = {name: texts[row] for name, texts in firsts.items() if row in texts}
        scores = {name: float(values[row]) for name, values in pairs.items()}
        return {"item": work.items[row], "difference": float(apart[row]), "scores": scores, "texts": work.texts_of(row),
                "first": first}  # fmt: skip

    return {"gains": [shown(n) for n in gains], "losses": [shown(n) for n in losses]}


def _score_on(data: DataSet, label: str, some: np.ndarray) -> float | None:
    """The score of a model on `some` (items,) of the items; None for pairs that all have the same gold value."""
    gold = None if data.gold is None else data.gold[some]
    if gold is not None and np.ptp(gold) == 0:
        return None
    return score(replace(data, gold=gold), data.runs[label][:, some])


def _by_feature(data: DataSet, labels: Sequence[str], features: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean score of each model on the thirds of the items by each feature, where the thirds differ."""
    found: dict[str, Any] = {}
    for name, values in features.items():
        cuts = np.unique(np.quantile(values, [1 / 3, 2 / 3]))
        place = np.searchsorted(cuts, values, side="left")
        found[name] = [
            {
                "from": float(values[place == third].min()), "to": float(values[place == third].max()),
                "items": int((place == third).sum()),
                "scores": {label: _score_on(data, label, place == third) for label in labels},
            }
            for third in np.unique(place)
        ]  # fmt: skip
    return found
