"""Runs that are prepared side by side: each is timed while no other one is active."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest

from cnnlib.measuring import schema
from cnnlib.measuring.run import TURN, Measurement, measure
from cnnlib.measuring.runs import Run, runs
from cnnlib.measuring.side_by_side import Order, Worker, side_by_side
from cnnlib.measuring.sweep import Sweep
from cnnlib.system.turns import turns
from tests.support.toys import toy_config, toy_data

pytestmark = pytest.mark.quick


class Span(NamedTuple):
    process: int
    stage: str
    batch_size: int
    repeat: int
    phase: str
    began: float
    ended: float

    @classmethod
    def read(cls, line: str) -> "Span":
        kinds = cls.__annotations__.values()
        return cls(*(kind(word) for kind, word in zip(kinds, line.split(), strict=True)))

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
    log, now = tmp_path / "phases", dict[int, str]()
    phase, taking_turns = Measurement.phase, Measurement._taking_turns

    def ended() -> None:
        if began := now.pop(os.getpid(), None):
            time.sleep(0.02)  # so that a phase is long enough to meet another one
            with open(log, "a") as file:
                file.write(f"{began} {time.monotonic()}\n")

    def noted(self: Measurement, name: str) -> None:
        ended()
        phase(self, name)
        run, process = self.run, os.getpid()
        which = f"{process} {run.stage} {run.batch_size} {run.repeat}"
        now[process] = f"{which} {name} {time.monotonic()}"

    @contextmanager
    def until_the_end(self: Measurement, telemetry: Any) -> Iterator[None]:
        with taking_turns(self, telemetry):
            yield
            ended()

    monkeypatch.setattr(Measurement, "phase", noted)
    monkeypatch.setattr(Measurement, "_taking_turns", until_the_end)
    return log


Which = tuple[str, int, int]
"""Stage, batch size and repeat of a run."""
Kept = tuple[int | None, int]
"""Whose engine a run had, if another repeat's, and how many cells its process had measured."""


def what_was_kept(spans: list[Span]) -> dict[Which, Kept]:
    """What run.json must say of each run, by which process did what in which order."""
    served = dict[int, dict[Which, None]]()
    for span in spans:
        served.setdefault(span.process, {})[span.stage, span.batch_size, span.repeat] = None
    expected = dict[Which, Kept]()
    for mine in map(list, served.values()):
        for i, (*cell, repeat) in enumerate(mine):
            first = next(each[2] for each in mine if [*each[:2]] == cell)
            others = {each[:2] for each in mine[:i]} - {tuple(cell)}
            expected[mine[i]] = None if first == repeat else first, len(others)
    return expected


def test_nothing_else_is_active_while_a_run_is_timed(
    tmp_path: Path, phases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNNLIB_CACHE", str(tmp_path / "cache"))
    config = toy_config(
        sweep={"stages": ["naive", "gemm"], "batch_sizes": [4, 8], "repeats": 2},
        measuring={"budget_images": 8},  # the least: engines of smaller batches are not kept
    ).model_copy(update={"results": str(tmp_path / "results")})
    (tmp_path / "results/data").mkdir(parents=True)
    shutil.move(toy_data(tmp_path)[0], tmp_path / "results/data/toy.npz")
    planned = Sweep(config, preparing=3, keep_processes=True)
    done = list(planned.measure())
    assert {each.run for each in done} == set(runs(config))
    assert all(each.sound for each in done)
    assert turns() is None
    spans = [Span.read(line) for line in phases.read_text().splitlines()]
    meeting = [(a, b) for i, a in enumerate(spans) for b in spans[:i] if a.meets(b)]
    assert not [pair for pair in meeting if pair[0].timed or pair[1].timed]
    assert meeting
    facts = json.loads((tmp_path / "results" / done[0].run.folder / "run.json").read_text())
    assert facts["preparing"] == 3
    assert not Sweep(config, preparing=3).due
    # a further repeat has the engine of the first, and is what it would have been by itself
    expected, found = what_was_kept(spans), dict[Which, Kept]()
    for run in runs(config):
        facts = json.loads((tmp_path / "results" / run.folder / "run.json").read_text())
        said = facts.get("engine_of_repeat"), facts.get("cells_before", 0)
        found[run.stage, run.batch_size, run.repeat] = said
    assert found == expected
    assert all((first == 1) == (repeat == 2) for (*_, repeat), (first, _) in found.items())
    assert any(others for _, others in found.values())
    run = next(r for r in runs(config) if (r.stage, r.batch_size, r.repeat) == ("gemm", 8, 2))
    folder = tmp_path / "results" / run.folder
    facts = json.loads((folder / "run.json").read_text())
    assert facts["checking_seconds"].keys() == {"before", "after"}
    single = measure(config, run, planned._datasets["toy"], tmp_path / "single")
    kept, alone = (schema.read_columns(f / "epochs.csv", "epochs") for f in (folder, single))
    for name in ("seed", "loss", "test_accuracy", "validated"):
        assert kept[name] == alone[name]


def test_one_that_fails_or_hangs_is_followed_by_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNNLIB_CACHE", str(tmp_path / "cache"))
    config = toy_config(
        sweep={"stages": ["gemm"], "repeats": 5}, measuring={"limit_seconds": 10.0}
    ).model_copy(update={"results": str(tmp_path / "results")})
    (tmp_path / "results/data").mkdir(parents=True)
    shutil.move(toy_data(tmp_path)[0], tmp_path / "results/data/toy.npz")
    log = tmp_path / "processes"

    def measured(config: Any, run: Run, dataset: Any, folder: Path, **options: Any) -> Path:
        with open(log, "a") as file:
            file.write(f"{run.repeat} {os.getpid()}\n")
        if run.repeat == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if run.repeat == 3:
            raise OSError("no room")
        if run.repeat == 4:
            time.sleep(600)
        return measure(config, run, dataset, folder, **options)

    monkeypatch.setattr("cnnlib.measuring.sweep.measure", measured)
    done = {each.run.repeat: each for each in Sweep(config, preparing=2).measure()}
    assert [done[number].sound for number in range(1, 6)] == [True, False, False, False, True]
    assert "killed by SIGKILL" in done[2].text
    assert done[3].error
    assert done[3].text == "no room"
    assert "took longer than measuring.limit_seconds, 10 s" in done[4].text
    processes = dict(line.split() for line in log.read_text().splitlines())
    assert list(processes) == ["1", "2", "3", "4", "5"]
    assert processes["1"] == processes["2"]
    assert len(set(processes.values())) == 4


def test_a_worker_that_ends_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNNLIB_CACHE", str(tmp_path / "cache"))
    due = runs(toy_config(sweep={"batch_sizes": [1, 2, 3, 4]}))

    def work(connection: Connection) -> None:
        while (run := connection.recv()) is not None:
            if run.batch_size == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            connection.send(f"{run.batch_size}")

    found = {run.batch_size: said for run, said in side_by_side(due, 2, work)}
    assert found == {1: "1", 2: "its process ended with exit code -9", 3: "3", 4: "4"}


def test_a_worker_goes_on_with_what_it_has_loaded() -> None:
    stages = ["gemm", "jax", "torch_compile", "jax_tf32"]
    order = Order(runs(toy_config(sweep={"stages": stages, "batch_sizes": [2, 4], "repeats": 2})))
    workers = [Worker(cast(Any, None), cast(Any, None)) for _ in range(3)]
    taken = list[tuple[int, str, int, int]]()
    while order:  # the workers are equally fast
        for number, worker in enumerate(workers):
            worker.run = None
            if run := order.take(worker, workers):
                worker.run = worker.last = run
                taken.append((number, run.stage, run.batch_size, run.repeat))
    mine = [[entry[1:] for entry in taken if entry[0] == number] for number in range(3)]
    assert mine[0][:4] == [("gemm", size, repeat) for size in (2, 4) for repeat in (1, 2)]
    both = [(stage, 2, repeat) for stage in ("jax", "jax_tf32") for repeat in (1, 2)]
    assert mine[1][:4] == both
    assert mine[2][:4] == [("torch_compile", size, repeat) for size in (2, 4) for repeat in (1, 2)]


def test_what_is_compared_is_measured_at_about_the_same_time() -> None:
    """Workers that take different times for a run, chosen by a generator of random numbers."""
    stages = ["naive", "gemm", "fused"]
    due = runs(toy_config(sweep={"stages": stages, "batch_sizes": [2, 4, 8, 16], "repeats": 3}))
    for preparing in (1, 2, 3, 6, 8):
        random, order = np.random.default_rng(preparing), Order(due)
        workers = [Worker(cast(Any, None), cast(Any, None)) for _ in range(preparing)]
        finished = list[Run]()
        while len(finished) < len(due):
            for worker in workers:
                if worker.run is None:
                    run = order.take(worker, workers)
                    worker.run, worker.last = run, run or worker.last
            at_work = [worker.run for worker in workers if worker.run]
            sizes = sorted({run.batch_size for run in at_work})
            assert len(sizes) <= 2
            assert len({(run.batch_size, run.stage) for run in at_work}) == len(at_work)
            left = {run.batch_size for run in due} - {run.batch_size for run in finished}
            assert not left or sizes[-1] <= 2 * min(left | {sizes[0]})
            chosen = random.choice([worker for worker in workers if worker.run])
            assert chosen.run
            finished.append(chosen.run)
            chosen.run = None
        assert len(set(finished)) == len(due)
        assert not order
        by_stage = [[run for run in finished if run.stage == stage] for stage in stages]
        for each in by_stage:
            repeats = [run.repeat for run in each if run.batch_size == 4]
            assert repeats == [1, 2, 3]
