"""Where trials run next: places of a machine, trials side by side on a GPU, and retries for lack of memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from poolwise.errors import PoolwiseError
from poolwise.runs import schedule
from poolwise.runs.schedule import Ending, Gpu, Place, Schedule, places_for, side_by_side, visible_gpus

GIB = 1 << 30
CARD = ("H200", 141 * GIB, 139 * GIB)


def trials(*names: str) -> Any:
    return [SimpleNamespace(name=name) for name in names]


def started(made: Schedule) -> list[tuple[str, int]]:
    """Everything that can start now: (trial, number of its place)."""
    found = []
    while (job := made.take()) is not None:
        found.append((job[0].name, made.places.index(job[1])))
    return found


def end(made: Schedule, name: str, kind: str = "done", peak: int | None = None) -> bool:
    place = next(place for place in made.places if name in place.running)
    return made.ended(SimpleNamespace(name=name), place, Ending(kind, "", peak))  # type: ignore[arg-type]


@pytest.fixture
def gpus() -> list[Gpu]:
    return visible_gpus([CARD, CARD], None)


def test_each_gpu_goes_by_the_name_that_selects_it() -> None:
    assert [gpu.name for gpu in visible_gpus([CARD, CARD], None)] == ["0", "1"]
    assert [gpu.name for gpu in visible_gpus([CARD, CARD], "3, GPU-5")] == ["3", "GPU-5"]
    assert [gpu.name for gpu in visible_gpus([CARD], "MIG-1,9")] == ["MIG-1"]  # CUDA stops at the first unknown one
    assert visible_gpus([], "") == []


def test_places(gpus: list[Gpu], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "cores", lambda: 6)
    assert [place.limit for place in places_for([])] == [6]
    assert [place.limit for place in places_for([], workers=3)] == [3]
    assert [(place.gpu.name, place.limit) for place in places_for(gpus) if place.gpu] == [("0", 1), ("1", 1)]
    assert [place.limit for place in places_for(gpus, per_gpu=3)] == [3, 3]
    assert [place.limit for place in places_for(gpus, workers=3)] == [2, 1]
    assert [place.limit for place in places_for(gpus, workers=1)] == [1]
    with pytest.raises(PoolwiseError, match="--per-gpu 2: no GPU is visible here; use --workers"):
        places_for([], per_gpu=2)
    with pytest.raises(PoolwiseError, match="--workers 2 and --per-gpu 3 contradict each other; give one"):
        places_for(gpus, workers=2, per_gpu=3)


def test_trials_go_in_turn_to_the_least_busy_place(gpus: list[Gpu]) -> None:
    made = Schedule(trials(*"abcdef"), places_for(gpus, per_gpu=2))
    assert started(made) == [("a", 0), ("b", 1), ("c", 0), ("d", 1)]
    assert not end(made, "d")
    assert not end(made, "b", "failed")
    assert started(made) == [("e", 1), ("f", 1)]


def test_how_many_fit() -> None:
    assert side_by_side(139 * GIB, 9 * GIB, 16) == schedule.MOST
    assert side_by_side(34 * GIB, 7 * GIB, 16) == 3  # .8 · 34 / (7 + 1)
    assert side_by_side(34 * GIB, 7 * GIB, 2) == 2  # no more than cores
    assert side_by_side(8 * GIB, 7 * GIB, 16) == 1


def test_a_gpu_takes_more_once_a_training_has_shown_its_memory(
    gpus: list[Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "cores", lambda: 6)
    made = Schedule(trials(*"abcdefgh"), places_for(gpus), measured=True)
    assert started(made) == [("a", 0), ("b", 1)]
    end(made, "a", peak=None)  # a reference: it says nothing about a training
    assert [place.limit for place in made.places] == [1, 1]
    assert started(made) == [("c", 0)]
    end(made, "b", peak=10 * GIB)
    assert [place.limit for place in made.places] == [3, 3]  # as many as cores for each
    assert started(made) == [("d", 1), ("e", 0), ("f", 1), ("g", 0), ("h", 1)]
    end(made, "d", peak=60 * GIB)  # a larger design
    assert [place.limit for place in made.places] == [1, 1]
    end(made, "e", peak=10 * GIB)
    assert [place.limit for place in made.places] == [1, 1]


def test_what_was_asked_for_is_not_measured(gpus: list[Gpu]) -> None:
    made = Schedule(trials(*"ab"), places_for(gpus, per_gpu=2))
    started(made)
    end(made, "a", peak=10 * GIB)
    assert [place.limit for place in made.places] == [2, 2]
    assert not Schedule(trials("a"), [Place(4)], measured=True).measured  # a processor


def test_out_of_memory_is_retried_beside_fewer_neighbours(gpus: list[Gpu]) -> None:
    made = Schedule(trials(*"abcdef"), places_for(gpus[:1], per_gpu=3), measured=True)
    (place,) = made.places
    assert started(made) == [("a", 0), ("b", 0), ("c", 0)]
    assert end(made, "b", "memory")
    assert place.limit == 2
    assert started(made) == []  # as many run as there is room for
    end(made, "a", peak=5 * GIB)
    assert place.limit == 2  # measuring is over: it was wrong
    assert started(made) == [("b", 0)]  # before those that have not been tried
    assert not place.alone
    end(made, "c")
    assert started(made) == [("d", 0)]  # the GPU does not wait for the retry


def test_a_retry_does_not_start_beside_as_many_as_before(gpus: list[Gpu]) -> None:
    made = Schedule(trials(*"abc"), places_for(gpus[:1], per_gpu=10))  # more places than trials
    assert len(started(made)) == 3
    assert end(made, "c", "memory")
    assert started(made) == []
    end(made, "a")
    assert started(made) == [("c", 0)]


def test_out_of_memory_beside_fewer_neighbours_is_retried_alone_once(gpus: list[Gpu]) -> None:
    made = Schedule(trials(*"abcdef"), places_for(gpus[:1], per_gpu=4))
    (place,) = made.places
    assert started(made) == [("a", 0), ("b", 0), ("c", 0), ("d", 0)]
    assert end(made, "b", "memory")
    end(made, "a")
    assert started(made) == [("b", 0)]
    assert end(made, "b", "memory")
    assert place.limit == 2
    assert started(made) == []  # nothing new may start, or the place would never be empty
    end(made, "c")
    assert started(made) == []
    end(made, "d")
    assert started(made) == [("b", 0)]
    assert place.alone
    assert not end(made, "b", "memory")  # that was the last time
    assert started(made) == [("e", 0), ("f", 0)]
    assert not place.alone


def test_a_lone_retry_waits_for_one_place_and_not_for_all(gpus: list[Gpu]) -> None:
    made = Schedule(trials(*"abcdefg"), places_for(gpus, per_gpu=2))
    assert started(made) == [("a", 0), ("b", 1), ("c", 0), ("d", 1)]
    assert end(made, "a", "memory")
    assert started(made) == []  # place 0 is kept free of new ones; place 1 is full
    end(made, "b")
    assert started(made) == [("e", 1)]
    end(made, "c")
    assert started(made) == [("a", 0)]
    assert made.places[0].alone
    end(made, "e")
    assert started(made) == [("f", 1)]
    end(made, "a")
    assert started(made) == [("g", 0)]


def test_a_retry_where_one_trial_ran_at_a_time(gpus: list[Gpu]) -> None:
    made = Schedule(trials("a"), places_for(gpus[:1]))
    started(made)
    assert end(made, "a", "memory")
    assert started(made) == [("a", 0)]
    end(made, "a")
    assert started(made) == []
