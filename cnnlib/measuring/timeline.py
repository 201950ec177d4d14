"""When every block of a persistent kernel is in which section of a step: rows, and a trace to view.

The trace is in the format that Perfetto (ui.perfetto.dev) and Chromium's about:tracing open.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cnnlib.config import Config
from cnnlib.datasets import noise
from cnnlib.engine import Stage
from cnnlib.engine.plans import records_of
from cnnlib.errors import ConfigError
from cnnlib.files import write_whole
from cnnlib.measuring.rows import RunRows
from cnnlib.measuring.runs import Run
from cnnlib.measuring.schema import Row
from cnnlib.stages import ALL, find_stage
from cnnlib.stages.tuned.engine import PersistentEngine
from cnnlib.stages.tuned.timeline import MarkedEngine, Section
from cnnlib.training.loop import start
from cnnlib.training.target import open_engine, open_target, setup_of


def measure_timeline(config: Config, run: Run, steps: int) -> list[Row]:
    """Rows of the table `timeline`: the sections of all blocks in so many steps on noise.

    The engine is opened in this process. Raises ConfigError for a stage without a persistent
    kernel, and what opening the engine does.
    """
    stage = find_stage(run.stage, "--stage")
    record = persistent(stage)
    if record is None:
        able = ", ".join(each.name for each in ALL if persistent(each))
        raise ConfigError(f"stage '{stage.name}' has no blocks that stay; --stage takes {able}")
    network = config.network(run.network, run.dataset, "--network")
    seed, count = config.training.seed, steps * run.batch_size
    images = noise(run.dataset, network.input_shape, network.classes, count)
    # to choose the plan by measuring would take up to sixteen compilations, and minutes
    setup = replace(setup_of(config, network, images, run.batch_size, seed), tune=False)
    with (
        open_target(stage, config.sweep.device) as target,
        open_engine(replace(record, engine=MarkedEngine), setup, target, images) as engine,
    ):
        assert isinstance(engine, MarkedEngine)
        start(engine, seed)
        engine.train(np.arange(count))  # a first launch finds nothing where it will be
        rows = RunRows(run, seed, target.name, target.kind)
        return [row_of(rows, section) for section in engine.train_marked(np.arange(count))]


def persistent(stage: Stage) -> Stage | None:
    """The record of the stage, or of one of its plans, whose engine is the persistent kernel's."""
    found = records_of(stage).values()
    return next((each for each in found if each.engine is PersistentEngine), None)


def row_of(rows: RunRows, section: Section) -> Row:
    """The row of a section."""
    return rows.row(
        step=section.step,
        block=section.block,
        section=section.name,
        part=section.part,
        begin_seconds=section.begin,
        end_seconds=section.end,
    )


def write_trace(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as a trace: a thread for each block, times in microseconds."""
    events = [
        {
            "name": row["section"],
            "cat": row["part"],
            "ph": "X",
            "ts": 1e6 * float(row["begin_seconds"]),
            "dur": 1e6 * (float(row["end_seconds"]) - float(row["begin_seconds"])),
            "pid": 0,
            "tid": row["block"],
            "args": {"step": row["step"]},
        }
        for row in rows
    ]
    names = [
        {
            "name": "thread_name",
            "ph": "M",
            "pid": 0,
            "tid": block,
            "args": {"name": f"block {block}"},
        }
        for block in dict.fromkeys(row["block"] for row in rows)
    ]
    with write_whole(path) as temporary:
        temporary.write_text(
            json.dumps({"traceEvents": names + events, "displayTimeUnit": "ns"}), encoding="utf-8"
        )
