"""Checkpoint scope: ranks, Friedman, who is not told apart, posteriors; never where designs carry a verdict."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolwise import stats
from poolwise.reports import pages
from poolwise.reports import ranks as ranks_report
from poolwise.verdicts.comparison import compare
from poolwise.verdicts.single_runs import alike
from poolwise.verdicts.table import table
from test_comparison import rows, study

SHIFTS = {"m1": 0.0, "m2": 0.03, "m3": 0.001, "m4": -0.03}


def single(**options):
    return compare(study(SHIFTS, seeds=1, types={"Retrieval": 12, "R": 1}), "m1", **options)


def test_only_checkpoint_scope_has_it():
    assert compare(study(SHIFTS, seeds=2, types={"Retrieval": 12}), "m1").single_runs == ()
    assert [found.group for found in single().single_runs] == ["Retrieval"]  # one task has no ranks
    assert single(interim="Interim: runs are missing.").single_runs == ()


def test_ranks_and_friedman():
    c = single()
    (found,) = c.single_runs
    scores = np.stack([c.arm("Retrieval", name).task_means for name in c.designs], axis=1)
    ranks = (-scores).argsort(axis=1).argsort(axis=1) + 1.0
    assert dict(found.ranks) == pytest.approx(dict(zip(c.designs, ranks.mean(axis=0), strict=True)))
    assert next(name for name, _ in found.ranks) == "m2"
    from scipy.stats import friedmanchisquare

    assert found.chi2 == pytest.approx(friedmanchisquare(*scores.T).statistic, abs=1e-9)
    assert found.p_value < 0.001


def test_pairs_are_corrected_within_the_group():
    c = single()
    (found,) = c.single_runs
    p = []
    for a, b, _ in found.pairs:
        d = c.arm("Retrieval", b).task_means - c.arm("Retrieval", a).task_means
        p.append(stats.signed_rank(d).p_value)
    assert len(p) == 6
    assert [q for _, _, q in found.pairs] == stats.holm(p).tolist()
    assert found.alike == (("m3", "m1"),) or found.alike == (("m1", "m3"),)


@given(
    st.integers(2, 6).flatmap(
        lambda k: st.tuples(st.just(k), st.sets(st.sampled_from(list(itertools.combinations(range(k), 2)))))
    )
)
def test_sets_not_told_apart_equal_enumeration(drawn):
    """All maximal sets of two or more without a pair that differs, against every subset."""
    k, couples = drawn
    names = [f"d{i}" for i in range(k)]
    apart = {frozenset((names[i], names[j])) for i, j in couples}
    free = [
        set(some)
        for size in range(2, k + 1)
        for some in itertools.combinations(names, size)
        if not any(frozenset(pair) in apart for pair in itertools.combinations(some, 2))
    ]
    largest = {frozenset(some) for some in free if not any(some < other for other in free)}
    found = alike(names, apart)
    assert {frozenset(members) for members in found} == largest
    assert len(found) == len(largest)


def test_posteriors_are_seeded_and_use_the_margin():
    (once,), (twice,) = single().single_runs, single().single_runs
    assert once.posteriors == twice.posteriors
    chances = {p.design: p for p in once.posteriors}
    assert chances["m2"].better > 0.99
    assert chances["m4"].worse > 0.99
    assert chances["m3"].equivalent > 0.95
    for p in once.posteriors:
        assert p.worse + p.equivalent + p.better == pytest.approx(1)
    (wide,) = single(margin=0.1).single_runs
    assert all(p.equivalent > 0.95 for p in wide.posteriors)


def test_report_shows_the_picture_and_says_checkpoints(tmp_path):
    c = single()
    (panel,) = ranks_report.panels(c.single_runs)
    assert "Critical-difference picture, Retrieval" in panel.alt
    assert all(name in panel.svg for name in c.designs)
    (said,) = ranks_report.sentences(c.single_runs)
    assert re.fullmatch(
        r"On retrieval \(12 tasks, checkpoints only\), Friedman’s p is <\.001; after Holm over all pairs, not told "
        r"apart: m\d and m\d\.",
        said,
    )
    frame = study(SHIFTS, seeds=1, types={"Retrieval": 12})
    _, html, _ = (p.read_text() for p in pages.render({}, frame, compare(frame, "m1"), None, None, tmp_path))
    assert "Ranks of checkpoints" in html
    assert "Critical-difference picture" in html
    json.dumps(c.to_json(), allow_nan=False)


def test_equal_scores_are_one_set():
    frame = table(rows({name: [[0.5] * 6] for name in ("a", "b", "c")}))
    (found,) = compare(frame, "a").single_runs
    assert found.alike == (("a", "b", "c"),)
    assert found.p_value == 1
    clear = table(rows({name: [[0.4 + 0.1 * i + 0.001 * t for t in range(6)]] for i, name in enumerate("ab")}))
    (found,) = compare(clear, "a").single_runs
    assert found.f is None  # the same strict order on every task: F has no bound
    assert found.alike == ()
