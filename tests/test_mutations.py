"""Damaged inputs: whatever happens to a file of results, it is read or refused, and nothing is claimed that the
undamaged input does not support.

`python tests/test_mutations.py 1000` makes that many mutations of each kind of input; the tests make a few.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from poolwise.api import compare, compare_pairs, compare_runs
from poolwise.errors import PoolwiseError
from poolwise.reports.words import outcome, sentences
from poolwise.screen import show_findings, show_paired, show_pairs

FEW = 40
"""Mutations of each kind of input in the tests."""
TASKS = (
    "STS12",
    "STS22",
    "SICK-R",
    "BIOSSES",
    "STS17",
    "JSICK",
    "KorSTS",
    "SICK-R-PL",
    "STSES",
    "IndicCrosslingualSTS",
)
BAD = ["NaN", "nan", "inf", "-inf", "", " ", "null", "None", "1e999", "-3", "72.4", "0,71", "x", "true", "[]", "{}"]
WORDS = {"better", "worse", "equivalent", "withheld"}
Claim = tuple[str, str, str]
"""(design, baseline, word)."""
TRUE = {("b", "a", "better"), ("a", "b", "worse"), ("b", "c", "better"), ("c", "b", "worse")}
"""b is 3 points above a on everything; c is a point above a on every second task or query and as much below on the
others, which shows nothing."""


def shift(design: str, i: int) -> float:
    return {"a": 0.0, "b": 0.03, "c": 0.01 if i % 2 else -0.01}[design]


def folder(root: Path) -> Path:
    """Published results of three models, each in one revision."""
    for design in "abc":
        place = root / "results" / f"org__{design}" / ("1" * 40)
        place.mkdir(parents=True)
        (place / "model_meta.json").write_text(json.dumps({"name": f"org/{design}", "release_date": "2025-01-01"}))
        for i, task in enumerate(TASKS):
            score = round(0.5 + 0.02 * i + shift(design, i), 4)
            entry = {"hf_subset": "default", "languages": ["eng-Latn"], "main_score": score, "cosine_spearman": score}
            content = {"task_name": task, "mteb_version": "2.1.0", "dataset_revision": "x", "evaluation_time": 2.5}
            text = json.dumps({**content, "scores": {"test": [entry]}}, indent=1)
            (place / f"{task}.json").write_text(text)
    return root / "results"


def scores(root: Path) -> Path:
    """A table of three designs, three runs each."""
    lines = ["design,seed,task,task_type,metric,score"]
    noise = random.Random(5)
    for i in range(8):
        for design in "abc":
            for seed in range(3):
                score = 0.5 + 0.02 * i + shift(design, i) + noise.gauss(0, 0.001)
                lines.append(f"{design},{seed},task {i},Retrieval,ndcg_at_10,{score:.4f}")
    (root / "scores.csv").write_text("\n".join(lines) + "\n")
    return root / "scores.csv"


def trec(root: Path) -> Path:
    """Three runs over 24 queries: b finds the document at rank 1, a at 2, c at 1 or 3."""
    (root / "runs").mkdir()
    (root / "runs" / "q.tsv").write_text("".join(f"q{i}\t0\tgood{i}\t1\n" for i in range(24)))
    for design in "abc":
        lines = []
        for i in range(24):
            place = {"a": 1, "b": 0, "c": 0 if i % 2 else 3}[design]
            documents = [f"d{j}" for j in range(4)]
            documents.insert(place, f"good{i}")
            lines += [f"q{i} Q0 {name} {j + 1} {9 - j}.5 {design}" for j, name in enumerate(documents)]
        (root / "runs" / f"{design}.run").write_text("\n".join(lines) + "\n")
    return root / "runs"


def claims_of_folder(path: Path) -> Iterator[Claim]:
    """Everything that the page claims; of single runs about checkpoints alone."""
    findings = compare(path)
    show_findings(findings, details=True)
    text = " ".join(sentences(findings))
    assert not re.search(r"\bnan\b", text), text
    assert findings.scope == "checkpoints" or path.suffix == ".csv", "a verdict on designs from single runs"
    for row in findings.rows:
        yield row.design, row.baseline, outcome(findings, row)
    pairs = compare_pairs(path)
    show_pairs(pairs, leaderboard=True)
    json.dumps(pairs.to_json(), allow_nan=False)
    json.dumps(findings.to_json(), allow_nan=False)
    for group in pairs.groups:
        for better, worse in pairs.above(group):
            yield better, worse, "better"


def claims_of_runs(path: Path) -> Iterator[Claim]:
    runs = sorted(file for file in path.iterdir() if file.name != "q.tsv")
    lines = compare_runs(runs, path / "q.tsv")
    show_paired(lines)
    for line in lines:
        assert math.isfinite(line.difference)
        if line.p_holm <= 0.05:
            yield line.design, line.baseline, "better" if line.difference > 0 else "worse"


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Iterator[Claim]]]] = {
    "folder": (folder, claims_of_folder),
    "table": (scores, claims_of_folder),
    "runs": (trec, claims_of_runs),
}


def truncated(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text) + 1)]


def without_a_line(text: str, rng: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    return "".join(lines)


def twice_a_line(text: str, rng: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return "".join(lines)


def shuffled(text: str, rng: random.Random) -> str:
    head, *lines = text.splitlines(keepends=True)
    rng.shuffle(lines)
    return "".join([head, *lines])


def bad_number(text: str, rng: random.Random) -> str:
    places = list(re.finditer(r"-?\d+\.\d+", text))
    if not places:
        return text
    place = rng.choice(places)
    return text[: place.start()] + rng.choice(BAD) + text[place.end() :]


def bad_cell(text: str, rng: random.Random) -> str:
    places = list(re.finditer(r"[^\s,\"]+", text))
    place = rng.choice(places)
    return text[: place.start()] + rng.choice([*BAD, "é", "\t", "\\", "#", "0"]) + text[place.end() :]


def odd_letter(text: str, rng: random.Random) -> str:
    i = rng.randrange(len(text))
    return text[:i] + rng.choice("\x00\u2028\ufeff\"'{}[],:\t\r😀") + text[i:]


def other_ends(text: str, rng: random.Random) -> str:
    return rng.choice(["\ufeff", ""]) + text.replace("\n", rng.choice(["\r\n", "\n\n", " \n"]))


def other_separator(text: str, rng: random.Random) -> str:
    return text.replace(rng.choice([",", " ", ":"]), rng.choice([";", "\t", "  ", ""]))


def other_word(text: str, rng: random.Random) -> str:
    words = [
        "main_score", "hf_subset", "task_name", "scores", "test", "default", "score", "seed", "task_type", "Q0",
        "ndcg_at_10", "Retrieval", "mteb_version", "dataset_revision", "cosine_spearman", "task 3", "STS12",
    ]  # fmt: skip
    present = [word for word in words if word in text]
    return text.replace(rng.choice(present), rng.choice([*words, "", "x"])) if present else text


def nothing(text: str, rng: random.Random) -> str:
    return rng.choice(["", "\n", "null", "[]", "{}", "0", '"scores"', '{"task_name": "STS12", "scores": {}}'])


TEXT = (truncated, without_a_line, twice_a_line, shuffled, bad_number, bad_cell, odd_letter, other_ends,
        other_separator, other_word, nothing)  # fmt: skip


def moved(place: Path, rng: random.Random) -> str:
    """One change of the files themselves; what was done."""
    files = sorted(file for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file())
    file = rng.choice(files)
    kind = rng.choice(["delete", "copy", "rename", "up", "binary", "copied folder", "external", "experiments"])
    if kind == "delete" and len(files) > 1:
        file.unlink()
    elif kind == "copy":
        shutil.copy(file, file.with_name(f"{file.stem} (1){file.suffix}"))
    elif kind == "rename" and len(files) > 1:
        file.rename(file.with_name(file.name.lower() if rng.random() < 0.5 else f"x{file.name}"))
    elif kind == "up" and place.is_dir():
        file.rename(file.parent.parent / file.name)
    elif kind == "binary":
        file.write_bytes(rng.randbytes(rng.randrange(200)))
    elif place.is_dir() and file.parent != place:
        name = {"copied folder": "2" * 40, "external": "external", "experiments": "experiments/dim_64"}.get(kind, "9")
        shutil.copytree(file.parent, file.parent.parent / name)
    return f"{kind} {file.name}"


def mutate(place: Path, rng: random.Random) -> str:
    """One to three changes; what was done, for the message of a failure."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < 0.2:
            done.append(moved(place, rng))
            continue
        files = sorted(file for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file())
        file, change = rng.choice(files), rng.choice(TEXT)
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            file.write_bytes(change(text, rng).encode("utf-8", errors="surrogatepass"))
            done.append(f"{change.__name__} {file.name}")
    return ", ".join(done)


def verdict_of(kind: str, seed: int, root: Path) -> str:
    """`refused`, `claims` or `no claim` for a mutated input; AssertionError for a claim without support."""
    make, claims = KINDS[kind]
    place = make(root)
    done = mutate(place, random.Random(f"{kind} {seed}"))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = list(claims(place))
    except PoolwiseError:
        return "refused"
    named = [(short(design), short(base), word) for design, base, word in found if word in WORDS]
    unsupported = [claim for claim in named if {*claim[:2]} <= {*"abc"} and claim not in TRUE]
    assert not unsupported, f"{kind} {seed} ({done}): {unsupported}"
    return "claims" if named else "no claim"


def short(name: str) -> str:
    return name.removeprefix("org/")


@pytest.mark.parametrize("kind", KINDS)
def test_the_undamaged_input_supports_its_claims(kind, tmp_path):
    make, claims = KINDS[kind]
    found = {(short(design), short(base), word) for design, base, word in claims(make(tmp_path)) if word in WORDS}
    assert ("b", "a", "better") in found
    assert found <= TRUE


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_input_is_read_or_refused_and_never_claims_more(kind, tmp_path):
    outcomes = Counter()
    for seed in range(FEW):
        root = tmp_path / str(seed)
        root.mkdir()
        outcomes[verdict_of(kind, seed, root)] += 1
    assert outcomes["claims"] > 0
    assert len(outcomes) > 1  # some damage leaves less to claim, or is refused


def main(count: int) -> int:
    """Make `count` mutations of each kind and print what came of them."""
    failures = 0
    for kind in KINDS:
        outcomes: Counter[str] = Counter()
        for seed in range(count):
            with tempfile.TemporaryDirectory() as root:
                try:
                    outcomes[verdict_of(kind, seed, Path(root))] += 1
                except Exception as error:
                    failures += 1
                    outcomes[type(error).__name__] += 1
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    print(f"{kind} {seed}: {type(error).__name__}: {str(error)[:300]} ({where.name}:{where.lineno})")
        print(f"{kind}: {dict(outcomes)}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]) if len(sys.argv) > 1 else FEW)))
