"""Runs that are prepared side by side: each is timed while no other one is active."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cnnlib.measuring.run import TURN, Measurement
from cnnlib.measuring.runs import runs
from cnnlib.measuring.side_by_side import side_by_side
from cnnlib.measuring.sweep import Sweep
from cnnlib.system.turns import turns
from tests.support.toys import toy_config, toy_data

pytestmark = pytest.mark.quick


class Span(NamedTuple):
    process: int
    phase: str
    began: float
    ended: float

    @property
    def timed(self) -> bool:
        return TURN.get(self.phase) == "alone"

    def meets(self, other: "Span") -> bool:
        return (
            self.process != other.process and self.began < other.ended and other.began < self.ended
        )


@pytest.fixture
def phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file into which runs write what they are doing, from when to when."""
    log, now = tmp_path / "phases", dict[int, tuple[str, float]]()
    phase, taking_turns = Measurement.phase, Measurement._taking_turns

    def ended() -> None:
        if began := now.pop(os.getpid(), None):
            time.sleep(0.02)  # so that a phase is long enough to meet another one
            with open(log, "a") as file:
                file.write(f"{os.getpid()} {began[0]} {began[1]} {time.monotonic()}\n")

    def noted(self: Measurement, name: str) -> None:
        ended()
        phase(self, name)
        now[os.getpid()] = name, time.monotonic()

    @contextmanager
    def until_the_end(self: Measurement, telemetry: Any) -> Iterator[None]:
        with taking_turns(self, telemetry):
            yield
            ended()

    monkeypatch.setattr(Measurement, "phase", noted)
    monkeypatch.setattr(Measurement, "_taking_turns", until_the_end)
    return log


def test_nothing_else_is_active_while_a_run_is_timed(
    tmp_path: Path, phases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNNLIB_CACHE", str(tmp_path / "cache"))
    config = toy_config(
        sweep={"stages": ["naive", "gemm"], "batch_sizes": [4, 8], "repeats": 2}
    ).model_copy(update={"results": str(tmp_path / "results")})
    (tmp_path / "results/data").mkdir(parents=True)
    shutil.move(toy_data(tmp_path)[0], tmp_path / "results/data/toy.npz")
    planned = Sweep(config, preparing=3)
    done = list(planned.measure())
    assert {each.run for each in done} == set(runs(config))
    assert all(each.sound for each in done)
    assert turns() is None
    lines = (line.split() for line in phases.read_text().splitlines())
    spans = [Span(int(p), name, float(b), float(e)) for p, name, b, e in lines]
    meeting = [(a, b) for i, a in enumerate(spans) for b in spans[:i] if a.meets(b)]
    assert not [pair for pair in meeting if pair[0].timed or pair[1].timed]
    assert meeting
    facts = json.loads((tmp_path / "results" / done[0].run.folder / "run.json").read_text())
    assert facts["preparing"] == 3
    assert not Sweep(config, preparing=3).due


def test_a_run_whose_process_ends_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNNLIB_CACHE", str(tmp_path / "cache"))
    due = runs(toy_config(sweep={"repeats": 4}))

    def measure(run: Any) -> str:
        if run.repeat == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{run.repeat}"

    found = {run.repeat: said for run, said in side_by_side(due, 2, measure)}
    assert found == {1: "1", 2: "its process ended with exit code -9", 3: "3", 4: "4"}
