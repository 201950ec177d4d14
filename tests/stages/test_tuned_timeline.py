"""The clocks of stage tuned's blocks: every section of every step is there, in order."""

import json
import pickle
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cnnlib.__main__ import main
from cnnlib.arithmetic import ceil_div
from cnnlib.device import cuda, open_device
from cnnlib.device.architecture import H100
from cnnlib.engine import Setup
from cnnlib.measuring import schema
from cnnlib.measuring.rows import RunRows
from cnnlib.measuring.runs import Run
from cnnlib.measuring.timeline import row_of, write_trace
from cnnlib.stages import tuned
from cnnlib.stages.tuned.timeline import (
    HEAD,
    MarkedEngine,
    Section,
    length_of_a_tick,
    zeros_by_shared_clock,
)
from cnnlib.system.shared_page import CAPACITY
from tests.support.networks import lenet5

STEPS, BATCH = 2, 3
STAGE = replace(tuned.PERSISTENT, engine=MarkedEngine)


@pytest.fixture(scope="module")
def marked() -> tuple[list[Section], np.ndarray, np.ndarray, int]:
    """(sections, parameters after marked steps, after the same steps unmarked, blocks)."""
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (8, 1, 28, 28), dtype=np.uint8)
    labels = random.integers(0, 10, 8, dtype=np.uint8)
    order = random.permutation(8)[: STEPS * BATCH].astype(np.int32)
    setup = Setup(lenet5(), batch_size=BATCH, learning_rate=0.1)
    with open_device("emulated") as device, MarkedEngine(STAGE, setup, device) as engine:
        engine.load(images, labels)
        start = lenet5().initial_parameters(1)
        engine.parameters = start
        sections = engine.train_marked(order)
        with_marks = engine.parameters
        engine.parameters, engine.velocity = start, np.zeros_like(start)
        engine.train(order)
        return sections, with_marks, engine.parameters, engine.grid


def test_marked_steps_train_the_same(marked: tuple) -> None:
    _, with_marks, without, _ = marked
    assert np.array_equal(with_marks, without)


def test_every_section_is_there_in_order(marked: tuple) -> None:
    sections, _, _, grid = marked
    forward = [f"{layer} forward" for layer in ("conv1", "conv2", "dense1", "dense2", "dense3")]
    backward = [name.replace("forward", "backward") for name in reversed(forward)]
    one = ["input", *forward, "loss", *backward, "leave_gradient"]
    end = ["wait for all blocks", "update"]
    for block in range(grid):
        for step in range(1, STEPS + 1):
            own = [s for s in sections if (s.block, s.step) == (block, step)]
            images = len(range(block, BATCH, grid))
            if images == 1:
                assert [s.name for s in own] == one + end
            else:
                counts = Counter(s.name for s in own)
                assert counts["conv1 forward"] == images
                assert [s.name for s in own][-2:] == end
            assert all(s.begin <= s.end for s in own)
            assert all(a.end == b.begin for a, b in pairwise(own))
    assert min(s.begin for s in sections) == 0.0
    assert {s.part for s in sections} == {"input", "forward", "loss", "backward", "update", "wait"}


def test_a_tick_is_as_long_as_the_shared_clock_says() -> None:
    marks = np.zeros((2, HEAD + 8), np.uint64)
    for block, zero in enumerate((1000, 77_000_000)):
        # 1.5 ticks a nanosecond; two steps that begin 1000 ns apart, one section each
        marks[block, :HEAD] = 4, 500, 1500
        marks[block, HEAD:] = 0, zero, 1, zero + 300, 0, zero + 1500, 1, zero + 1800
    assert length_of_a_tick(marks) == pytest.approx(1e-9 / 1.5)


def test_blocks_without_a_barrier_are_set_by_the_shared_clock() -> None:
    """The second block begins 400 ns after the first, by a clock that shows another time."""
    marks = np.zeros((2, HEAD + 4), np.uint64)
    for block, (begin, zero) in enumerate(((500, 1000), (900, 77_000_000))):
        marks[block, :HEAD] = 2, begin, begin
        marks[block, HEAD:] = 0, zero, 1, zero + 300
    assert zeros_by_shared_clock(marks, 1e-9 / 1.5) == [1000, 77_000_000 - 600]


@pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc on PATH")
def test_it_compiles_for_a_gpu() -> None:
    setup = Setup(lenet5(), batch_size=64, learning_rate=0.1)
    source = MarkedEngine.plan_on(STAGE, setup, H100.limits).source(timeline=True)
    cubin = cuda.compile_cubin(source, "tuned_lenet5_timeline", "sm_90", ())
    for kernel in ("mark_train", "mark_forward_backward", "mark_update"):
        assert f".text.step_{kernel}".encode() in cubin


def test_rows_and_a_trace_say_the_same(marked: tuple, tmp_path: Path) -> None:
    rows = [
        row_of(RunRows(Run("mnist", "lenet5", "tuned", BATCH, 1), 1, "a GPU", "cuda"), section)
        for section in marked[0]
    ]
    schema.write(tmp_path / "timeline.csv", "timeline", rows)
    read = schema.read(tmp_path / "timeline.csv", "timeline")
    assert len(read) == len(rows)
    write_trace(tmp_path / "trace.json", rows)
    trace = json.loads((tmp_path / "trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for event, row in zip(events, read.itertuples(), strict=True):
        assert (event["name"], event["tid"]) == (row.section, row.block)
        assert event["ts"] == pytest.approx(1e6 * row.begin_seconds)
        assert event["dur"] == pytest.approx(1e6 * (row.end_seconds - row.begin_seconds), abs=1e-9)


def test_more_rows_than_a_supervised_call_may_return_are_written(
    marked: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunRows(Run("mnist", "lenet5", "tuned", BATCH, 1), 1, "a GPU", "cuda")
    rows = [row_of(run, section) for section in marked[0]]
    rows = [dict(row) for row in rows * ceil_div(16_000, len(rows))]
    assert len(pickle.dumps(rows)) > CAPACITY
    monkeypatch.setattr("cnnlib.measuring.timeline.measure_timeline", lambda *_: rows)
    out = tmp_path / "timeline.csv"
    assert main(["timeline", "--out", str(out), "--network", "lenet5"]) == 0
    assert len(schema.read(out, "timeline")) == len(rows)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--steps", "1"], "--steps must be at least 2, not 1"),
        (["--stage", "fused"], "stage 'fused' has no blocks that stay; --stage takes tuned"),
    ],
)
def test_what_cannot_be_recorded_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], option: list[str], words: str
) -> None:
    assert main(["timeline", "--out", str(tmp_path / "timeline.csv"), *option]) == 2
    assert words in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
