"""A choice by measuring is made once and kept, so that it stays the same."""

import math
from pathlib import Path
from typing import Any

import pytest

from cnnlib.device import Device
from cnnlib.engine import autotune, plan
from cnnlib.engine.autotune import Unsteady, fastest, measured_once, steady
from cnnlib.stages.tuned import PERSISTENT as STAGE
from cnnlib.stages.tuned import engine as persistent
from cnnlib.stages.tuned.engine import PersistentEngine
from cnnlib.stages.tuned.plan import BlockPlan, candidates
from cnnlib.validation.parity import validate
from cnnlib.validation.spot_checks import five_steps
from tests.support.engines import Limited, open_engine, pictures
from tests.support.networks import awkward


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CNNLIB_CACHE", str(tmp_path))
    return tmp_path


def test_the_first_gives_way_only_to_what_is_clearly_faster() -> None:
    assert fastest([1.0, 0.98, 1.2]) == 0
    assert fastest([1.0, 0.5, 0.4]) == 2
    assert fastest([math.nan, 2.0, 1.0]) == 2
    assert fastest([1.0, math.nan]) == 0


def test_it_is_measured_once(cache: Path) -> None:
    asked = []

    def measure() -> list[float]:
        asked.append(1)
        return [0.5, math.nan]

    for _ in range(3):
        first, second = measured_once("key", 2, measure)
        assert first == 0.5
        assert math.isnan(second)
    assert len(asked) == 1
    measured_once("other", 2, measure)
    assert len(asked) == 2


@pytest.mark.parametrize("content", [b"", b"[0.5, 1]", b"\x00\xff"])
def test_a_damaged_choice_is_made_again(cache: Path, content: bytes) -> None:
    measured_once("key", 2, lambda: [0.5, 1.0])
    (path,) = cache.glob("key*")
    path.write_bytes(content)
    assert measured_once("key", 2, lambda: [3.0, 4.0]) == [3.0, 4.0]


def test_a_choice_among_others_is_made_again(cache: Path) -> None:
    measured_once("key", 3, lambda: [0.5, 1.0, 2.0])
    assert measured_once("key", 2, lambda: [3.0, 4.0]) == [3.0, 4.0]


def test_a_measurement_that_fails_leaves_nothing(cache: Path) -> None:
    def measure() -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured_once("key", 2, measure)
    assert not list(cache.iterdir())


@pytest.mark.usefixtures("in_haste")
def test_every_plan_that_is_tried_is_right(
    limited: Limited, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All candidates train alike, whichever is the fastest on a machine."""
    network, count = awkward(), 20
    device = limited(multiprocessors=2)
    plans = candidates(STAGE, plan(STAGE, network), count, device)
    assert len({plan.source() for plan in plans}) == len(plans) >= 3
    for number, chosen in enumerate(plans):
        monkeypatch.setattr(autotune, "WORTH", 1.0)
        times = [2.0] * len(plans)
        times[number] = 1.0
        monkeypatch.setattr(
            persistent, "measured_steadily", lambda key, n, measure, times=times: times
        )
        with open_engine(STAGE, network, count, device, tune=True) as engine:
            assert isinstance(engine, PersistentEngine)
            assert engine.block is not plans[0] or number == 0
            assert engine.block.facts == chosen.facts
            validate(engine, *pictures(network, count))
            five_steps(engine, *pictures(network, 3 * count))


def test_times_that_do_not_repeat_are_not_taken() -> None:
    assert steady([1.1, 1.0, 1.15]) == 1.0
    with pytest.raises(Unsteady):
        steady([1.0, 1.1, 1.3])


@pytest.mark.parametrize("bad", [1, autotune.ATTEMPTS])
def test_a_choice_needs_times_that_repeat(
    device: Device, cache: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    network, rounds, compiled = awkward(), [], []
    monkeypatch.setattr(device, "precompile", lambda *_: compiled.append(1))

    def counted(*arguments: Any) -> list[float]:
        rounds.append(1)
        return measured_once(*arguments)

    monkeypatch.setattr(autotune, "measured_once", counted)

    def times(engine: PersistentEngine, plan: BlockPlan) -> float:
        return steady([1.0, 2.0] if len(rounds) <= bad else [1.0, 1.0])

    monkeypatch.setattr(PersistentEngine, "_step_seconds", times)
    with open_engine(STAGE, network, 6, device, tune=True) as engine:
        found = bad < autotune.ATTEMPTS
        assert ("tried" in engine.choices) == found
        assert ("not_tried" in engine.choices) == (not found)
        if not found:
            assert "did not repeat in 3 attempts" in engine.choices["not_tried"]
        assert len(list(cache.glob("*.times"))) == found
        ways = candidates(STAGE, plan(STAGE, network), 6, device)
        assert engine.block.images == ways[0].images
        assert engine.block.threads == ways[0].threads
    assert len(rounds) == min(bad + 1, autotune.ATTEMPTS)
    assert len(compiled) == 1


@pytest.mark.usefixtures("in_haste")
def test_plans_are_timed_and_the_choice_is_recorded(
    limited: Limited, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, count = awkward(), 6
    device = limited(multiprocessors=2)
    monkeypatch.setattr(persistent, "MIN_STEPS", 2)
    monkeypatch.setattr(persistent, "MAX_STEPS", 2)
    monkeypatch.setattr(autotune, "STEADY", math.inf)  # this machine may be busy
    with open_engine(STAGE, network, count, device, tune=True) as engine:
        choices = engine.choices
        times = [way["step_seconds"] for way in choices["tried"]]
        assert len(times) >= 2
        assert all(0 < time < 60 for time in times)
        way = choices["tried"][fastest(times)]
        assert choices["chosen"] == {k: v for k, v in way.items() if k != "step_seconds"}
        # trials leave nothing behind
        validate(engine, *pictures(network, count))
        five_steps(engine, *pictures(network, 3 * count))

    def again(*_: object) -> float:
        raise AssertionError("it is known which is the fastest")

    monkeypatch.setattr(PersistentEngine, "_step_seconds", again)
    with open_engine(STAGE, network, count, device, tune=True) as engine:
        assert engine.choices == choices
