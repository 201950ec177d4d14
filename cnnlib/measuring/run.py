"""One measurement: check, warm up, time epochs and single steps, check them, write the rows.

An epoch runs from before its order is drawn until its last update is visible to the host:
shuffling, gathering, every transfer the stage needs, compute, update. Compiling, loading the data
set into host memory, validation, warm-up and evaluation are outside.
"""

import hashlib
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.device import KernelError
from cnnlib.engine import Engine, ImageByImage, Order, Stage
from cnnlib.errors import DoesNotFit, Unsupported, UserError, WorkerDied
from cnnlib.files import check_writable, write_whole
from cnnlib.measuring import schema
from cnnlib.measuring.freshness import run_files, settings_digest, table_digests
from cnnlib.measuring.gpu_processes import Presence
from cnnlib.measuring.learning_curve import learning_curve, watched_images
from cnnlib.measuring.runs import Run, digest, seed_of, usual_batch_size
from cnnlib.measuring.telemetry import Sampler, sustain
from cnnlib.paths import ROOT
from cnnlib.stages import find_stage
from cnnlib.system.interrupts import Stopped, within
from cnnlib.system.machine import provenance
from cnnlib.system.supervisor import supervised
from cnnlib.training.checkpoint import State, read_notes
from cnnlib.training.loop import accuracy, epoch_order, start, train_epochs
from cnnlib.training.target import Target, check_batch, open_engine, open_target, setup_of
from cnnlib.validation.parity import Unjudged, ValidationFailed
from cnnlib.validation.replay import Recording, recorded_epochs
from cnnlib.validation.trajectory import check_after, check_before, check_momentum

Row = dict[str, Any]

# Rows of an extrapolated run: blocks are timed until their spread is this small (or time is up).
ENOUGH_BLOCKS = 5
SMALL_SPREAD = 0.02

TIMED_IN = {
    "train": ("epochs", "steps"),
    "profile": ("kernels",),
    "learn": ("learning", "predictions"),
    "sustain": ("energy",),
}
"""Phases of a run in which others on its GPU disturb, and the tables that hold what was timed."""


@dataclass
class Rows:
    """The rows of one run, each completed with the run's identity and standing."""

    run: Run
    seed: int
    device: str = ""
    device_kind: str = "cpu"
    validated: bool = False
    """No row is until all checks have been passed and `vouch` is called."""
    extrapolated: bool = False
    settings: str = ""
    """The digest of cnnlib.measuring.freshness, for run.json."""

    def __post_init__(self) -> None:
        self.checking: dict[str, float] = {}
        """Seconds that the checks have taken which `validated` stands for, by their kind."""
        self.tables: dict[str, list[Row]] = {name: [] for name in schema.RUN_TABLES}

    def __getitem__(self, table: str) -> list[Row]:
        return self.tables[table]

    def add(self, table: str, status: str = "ok", **values: Any) -> None:
        self[table].append(
            {
                "dataset": self.run.dataset,
                "network": self.run.network,
                "stage": self.run.stage,
                "device": self.device,
                "batch_size": self.run.batch_size,
                "seed": self.seed,
                "repeat": self.run.repeat,
                "device_kind": self.device_kind,
                "status": status,
                "validated": self.validated,
                "extrapolated": self.extrapolated,
            }
            | values
        )

    def epoch(self, status: str = "ok", **values: Any) -> None:
        row = dict(
            epoch=len(self["epochs"]) + 1, images=0, epoch_seconds=math.nan,
            event_seconds=math.nan, loss=math.nan, test_accuracy=math.nan,
        )  # fmt: skip
        self.add("epochs", status, **row | values)

    def discard(self, status: str, why: str) -> None:
        """Replace all rows by one, not validated, with this status and the reason."""
        for table in self.tables.values():
            table.clear()
        self.validated = self.extrapolated = False
        self.epoch(status, reason=why)

    def vouch(self) -> None:
        """All checks have been passed, also those of what has been timed."""
        self.validated = True
        for table in self.tables.values():
            for row in table:
                row["validated"] = True

    def disturb(self, *tables: str) -> None:
        """Others were there. What did not fit might have, without them."""
        for table in tables:
            for row in self[table]:
                if row["status"] in ("ok", "does_not_fit"):
                    row["status"] = "disturbed"

    def step(self, seconds: float) -> None:
        self.add("steps", step=len(self["steps"]) + 1, step_seconds=seconds)

    def in_full(self, table: str, **values: Any) -> None:
        """A row of what was measured as it is, also where the run's epochs are scaled."""
        self.add(table, **{"status": "ok"} | values | {"extrapolated": False})


def measure(
    config: Config,
    run: Run,
    dataset: Dataset,
    folder: Path,
    *,
    checkpoints: Path | None = None,
    stop: Callable[[], int] = lambda: 0,
    mark: bool = False,
) -> Path:
    """Measure `run` and write its tables (schema.RUN_TABLES) and run.json into `folder`.

    A run in full that takes longer than measuring.budget_seconds is saved in the folder
    `checkpoints` every half minute and gone on from there (`resumed` in run.json says so), if
    neither the settings nor the code have changed; `stop` is that of training.train_epochs.

    A batch that does not fit the device gives one `does_not_fit` row, a network whose sizes the
    stage's operators refuse one `unavailable` row, a network for which no check can tell whether
    the stage is right one `unjudged` row, and a loss that is not finite ends the run with a
    `diverged` row: these are results. What is timed while another process is on the run's GPU is
    `disturbed`, and run.json says by whom (cnnlib.measuring.gpu_processes: how that is known).

    Raises ValidationFailed when the stage does not train as it should
    (cnnlib.validation.trajectory: what is compared, before the clock starts and after it has
    stopped), and whatever the stage raises; nothing is written then. With `mark` the run gets one
    `failed` row instead, and its run.json says why; so does one that takes longer than
    measuring.limit_seconds, which ends the process. Returns `folder`.
    """
    stage = find_stage(run.stage, "--stage")
    network = config.network(run.network, run.dataset, "--network")
    rows = Rows(run, seed_of(config, run.repeat))
    rows.settings = settings_digest(config, run, stage.runs_on)
    described: dict[str, Any] = {}
    began = datetime.now(UTC)
    safe = Safe(checkpoint_file(config, run, checkpoints), stop)
    check_batch(dataset, run.batch_size)
    check_writable(*run_files(folder))
    if safe.checkpoint is not None:
        check_writable(safe.checkpoint)
    with (
        Sampler(config.measuring.sample_interval) as sampler,
        _limited(config, run, folder, rows, began, mark),
        open_target(stage, config.sweep.device) as target,
    ):
        rows.device, rows.device_kind = target.name, target.kind
        sampler.attach(target.pci_bus_id)
        sustained = 0
        try:
            done = False
            for size in _engine_batches(config, run, stage):
                if not done:
                    setup = setup_of(config, network, dataset, size)
                    with open_engine(stage, setup, target, dataset) as engine:
                        described |= what_runs(engine, target)
                        recording = _measure(config, rows, engine, dataset, sampler, safe)
                        done = recording is not None
                        if recording is not None and _trained(rows):
                            sustained = _afterwards(config, rows, recording, dataset, sampler)
                    if done and not config.training.momentum:
                        with _checking(rows, sampler, "momentum"):
                            check_momentum(stage, setup, target, dataset, rows.seed)
            rows.vouch()
        except (DoesNotFit, MemoryError) as error:
            described["does_not_fit"] = str(error) or "out of memory"
            rows.epoch("does_not_fit", reason=described["does_not_fit"])
        except Unsupported as error:
            described["unavailable"] = str(error)
            rows.epoch("unavailable", reason=str(error))
        except Unjudged as error:
            described["unjudged"] = str(error)
            rows.discard("unjudged", str(error))
        except Exception as error:
            if not mark or not is_the_stages(error):
                raise
            if not isinstance(error, ValidationFailed):  # whose one line says everything
                traceback.print_exc()
            return fail(config, run, folder, rows, began, f"{type(error).__name__}: {error}")
    for sample in sampler.rows():
        rows.in_full("samples", **sample)
    if _trained(rows):
        rows.in_full("energy", **sampler.energy(sustained))
    described |= _disturbances(rows, sampler)
    if safe.resumed:
        described["resumed"] = True
    _write(config, run, folder, rows, began, described)
    if safe.checkpoint is not None:
        safe.checkpoint.unlink(missing_ok=True)
    return folder


def what_runs(engine: Engine, target: Target) -> dict[str, Any]:
    """The engine, its operators, how they are built and what the engine has decided for itself.

    All of it is asked of the engine, nothing taken from the config. `engine_batch_size` may be a
    part of the run's batch (see _engine_batches).
    """
    return {
        "engine": type(engine).__name__,
        "engine_batch_size": engine.setup.batch_size,
        "plan": engine.served,
        **({"built": target.device.built} if target.device is not None else {}),
        **engine.choices,
    }


def is_the_stages(error: Exception) -> bool:
    """Whether it is the stage that failed, not what it was given or who stopped it."""
    if isinstance(error, (ValidationFailed, KernelError, WorkerDied)):
        return True
    return not isinstance(error, (UserError, Stopped))


def _write(
    config: Config, run: Run, folder: Path, rows: Rows, began: datetime, described: dict[str, Any]
) -> None:
    """The tables and run.json, in which `described` stands too."""
    # An older result is gone before the first of its files is replaced.
    (folder / "run.json").unlink(missing_ok=True)
    for former in schema.FORMER.tables:
        (folder / f"{former}.csv").unlink(missing_ok=True)
    for name in schema.RUN_TABLES:
        schema.write(folder / f"{name}.csv", name, rows[name])
    facts = {
        "run": vars(run),
        "seed": rows.seed,
        "device": rows.device,
        "device_kind": rows.device_kind,
        "status": rows["epochs"][-1]["status"],
        "started": began.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - began).total_seconds(), 3),
        "checking_seconds": {kind: round(took, 3) for kind, took in rows.checking.items()},
        "config": digest(config),
        "settings": rows.settings,
        "tables": table_digests(folder),
        **described,
        **provenance(),
    }
    # Written last: where run.json stands, the run is complete.
    with write_whole(folder / "run.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def fail(config: Config, run: Run, folder: Path, rows: Rows, began: datetime, why: str) -> Path:
    """Mark the run as failed: one row, whatever had been measured, and `why` in run.json."""
    rows.discard("failed", why)
    _write(config, run, folder, rows, began, {"failed": why})
    return folder


@contextmanager
def _limited(
    config: Config, run: Run, folder: Path, rows: Rows, began: datetime, mark: bool
) -> Iterator[None]:
    """Ends the process when a run that is not in full takes too long; a supervisor does better."""
    limit = config.measuring.limit_seconds
    why = (
        f"stage '{run.stage}' hangs: {run.folder} took longer than measuring.limit_seconds, "
        f"{limit:g} s"
    )

    def hung() -> int:
        print(f"error: {why}", file=sys.stderr, flush=True)
        if not mark:
            return 1
        fail(config, run, folder, rows, began, why)
        return 0

    if config.measuring.full or supervised():
        yield
        return
    with within(limit, hung):
        yield


@dataclass
class Safe:
    """Where a long measurement is saved meanwhile, and how it learns that it should stop."""

    checkpoint: Path | None
    stop: Callable[[], int]
    resumed: bool = False


def checkpoint_file(config: Config, run: Run, folder: Path | None) -> Path | None:
    """The checkpoint of a run in full; its name changes with the settings and with the code."""
    if folder is None or not config.measuring.full:
        return None
    content = hashlib.sha256(digest(config).encode())
    for path in sorted([*ROOT.glob("cnnlib/**/*.py"), *ROOT.glob("kernels/**/*.cuh")]):
        content.update(path.read_bytes())
    return folder / run.folder / f"{content.hexdigest()[:16]}.npz"


def _engine_batches(config: Config, run: Run, stage: Stage) -> list[int]:
    """The batches to build an engine for until one will do: the run's, or a part of it first.

    Stage 1's time per image does not depend on the batch (only its update does, which is timed
    apart), so within a budget it need not train on 4096 images to tell how long they would take.
    """
    if issubclass(stage.engine, ImageByImage) and not config.measuring.full:
        return sorted({min(run.batch_size, config.measuring.budget_images), run.batch_size})
    return [run.batch_size]


def _disturbances(rows: Rows, sampler: Sampler) -> dict[str, Any]:
    """Mark what was timed while others were on the run's GPU; who they were, for run.json."""
    if rows.device_kind != "cuda":
        return {}
    if not sampler.saw_processes:
        return {"unwatched": "NVML lists no process of this GPU; others would not be noticed"}
    found: dict[int, Presence] = {}
    timed_in: list[tuple[str | None, tuple[str, ...]]] = list(TIMED_IN.items())
    if rows["epochs"][-1]["status"] == "does_not_fit":
        timed_in = [(None, ("epochs", "steps"))]  # whenever they took the memory
    for phase, tables in timed_in:
        if others := sampler.others(phase):
            rows.disturb(*tables)
            found |= {other.process: other for other in others}
    who = [
        {"process": other.process, "name": other.name, "memory_mib": round(other.memory_mib, 1)}
        for other in found.values()
    ]
    return {"disturbed": who} if who else {}


def _trained(rows: Rows) -> bool:
    return bool(rows["epochs"]) and rows["epochs"][-1]["status"] == "ok"


def _measure(
    config: Config, rows: Rows, engine: Engine, dataset: Dataset, sampler: Sampler, safe: Safe
) -> Recording | None:
    """Time `engine`; None where that takes epochs and its batch is a part of the run's."""
    size, images, labels = engine.setup.batch_size, dataset.train_images, dataset.train_labels
    with _checking(rows, sampler, "before"):
        start(engine, rows.seed)
        check_before(engine, images, labels, rows.seed)
    sampler.phase("warm_up")
    start(engine, rows.seed)
    seconds_per_image = warm_up(config, engine, dataset, rows.seed)
    start(engine, rows.seed)
    whole = seconds_per_image * len(labels) * config.training.epochs
    recording = Recording(engine)
    sampler.phase("train")
    if whole > budget(config, rows.device_kind):
        rows.extrapolated = True
        _time_blocks(config, rows, recording, dataset)
    elif size < rows.run.batch_size:
        return None
    else:
        if whole <= config.measuring.budget_seconds:
            safe.checkpoint = None  # not worth it: saving would only disturb
        _time_epochs(config, rows, recording, dataset, sampler, safe)
    # The curve of the first repeat is a replay of the epochs by itself; it comes later.
    replayed = config.training.epochs if _learns(config, rows, recording) else 0
    with _checking(rows, sampler, "after"):
        check_after(recording, images, labels, rows.seed, replayed)
    return recording


@contextmanager
def _checking(rows: Rows, sampler: Sampler, kind: str) -> Iterator[None]:
    """Notes what the checks within it take; run.json says it."""
    sampler.phase("validate")
    began = time.perf_counter()
    try:
        yield
    finally:
        rows.checking[kind] = time.perf_counter() - began


def _learns(config: Config, rows: Rows, recording: Recording) -> bool:
    """Whether the learning curve passes through the states in which the timed epochs ended."""
    return (
        _trained(rows)
        and rows.run.repeat == 1
        and not rows.extrapolated
        and recording.engine.stage.repeatable
        and [call.epoch for call in recording.calls if call.epoch]
        == list(range(1, config.training.epochs + 1))
    )


def _has_curve(config: Config, rows: Rows, engine: Engine) -> bool:
    """Whether this run is trained once more, to see what the network knows at which moment.

    Repeats differ in their seed alone, so one curve is enough, and an engine for a part of the
    batch would learn something else. With kernels compiled for the CPU a short curve takes seconds,
    which are spent on the batch size that figures show.
    """
    drawn = rows.run.batch_size == usual_batch_size(config)
    emulated = rows.device_kind == "emulated" and rows.extrapolated
    return (
        rows.run.repeat == 1
        and engine.setup.batch_size == rows.run.batch_size
        and (drawn or not emulated)
    )


def _afterwards(
    config: Config, rows: Rows, recording: Recording, dataset: Dataset, sampler: Sampler
) -> int:
    """What is looked at when the clock has been read; images trained on for the energy."""
    measuring, engine = config.measuring, recording.engine
    sampler.phase("profile")
    for kernel in engine.profile():
        values = kernel._asdict()
        rows.in_full("kernels", kernel_seconds=values.pop("seconds"), **values)
    recording.unchanged("a profile")
    if _has_curve(config, rows, engine):
        sampler.phase("learn")
        hard = config.dataset(rows.run.dataset, "--dataset").hard_images
        points, predictions = learning_curve(
            engine, dataset, watched_images(dataset, hard),
            seed=rows.seed, epochs=config.training.epochs, test_images=measuring.learning_images,
            budget_seconds=learning_budget(config, rows),
            ended=recording.reached if _learns(config, rows, recording) else None,
        )  # fmt: skip
        whole = len(dataset.train_labels) // engine.setup.batch_size * engine.setup.batch_size
        if _learns(config, rows, recording) and (
            points[-1]["images"] < config.training.epochs * whole
        ):
            recording.check()  # a curve that ended early has not replayed all of the epochs
        for point in points:
            rows.in_full("learning", **point)
        for prediction in predictions:
            rows.in_full("predictions", **prediction)
    if rows.device_kind != "cuda" or not measuring.energy_seconds:
        return 0
    sampler.phase("sustain")
    count = len(dataset.train_labels)
    images = sustain(engine, count, rows.seed, measuring.energy_seconds)
    sampler.phase("close")
    return images


def budget(config: Config, device_kind: str) -> float:
    """Seconds that all epochs of a run may take; one that takes longer is timed on a part.

    What a GPU's kernels take where they are compiled for the CPU says nothing about a GPU, so
    there is no need to wait for the whole of it.
    """
    measuring = config.measuring
    if measuring.full:
        return math.inf
    if device_kind == "emulated":
        return min(measuring.emulated_seconds, measuring.budget_seconds)
    return measuring.budget_seconds


def learning_budget(config: Config, rows: Rows) -> float:
    """Seconds of training after which a learning curve ends.

    Where a machine is so slow that a CPU stage is scaled, its curve at the batch size that figures
    show may take the time that its epochs would have been given: those of others go on with it.
    """
    measuring = config.measuring
    if not rows.extrapolated:
        return math.inf
    if rows.device_kind == "emulated":
        return measuring.emulated_seconds
    drawn = rows.run.batch_size == usual_batch_size(config)
    if rows.device_kind == "cpu" and drawn:
        return max(measuring.budget_seconds, measuring.sample_seconds)
    return measuring.sample_seconds


def warm_up(config: Config, engine: Engine, dataset: Dataset, seed: int) -> float:
    """Train for warmup_seconds, at least one step; seconds per image of the last steps."""
    size = engine.setup.batch_size
    order = epoch_order(len(dataset.train_labels), seed, 0)
    ends = time.perf_counter() + config.measuring.warmup_seconds
    steps = 1
    while True:
        began = time.perf_counter()
        engine.train(order[: steps * size])
        now = time.perf_counter()
        if now >= ends:
            return (now - began) / (steps * size)
        steps = min(2 * steps, len(order) // size)


def _time_epochs(
    config: Config, rows: Rows, recording: Recording, dataset: Dataset, sampler: Sampler, safe: Safe
) -> None:
    engine = recording.engine
    count, size = len(dataset.train_labels), engine.setup.batch_size
    epochs, steps = config.training.epochs, count // size
    options: dict[str, Any] = {}
    blocks: Blocks | None = None
    if safe.checkpoint is not None:
        if safe.checkpoint.exists():
            rows["epochs"][:] = json.loads(read_notes(safe.checkpoint) or "[]")
            safe.resumed = True
        blocks = Blocks(recording, count, epochs, rows.seed, known=not safe.resumed)
        options = dict(
            checkpoint=safe.checkpoint, stop=safe.stop, notes=lambda: json.dumps(rows["epochs"]),
            report=blocks.ended,
        )  # fmt: skip
    recording.begin()
    trained = (
        train_epochs(engine, count, epochs, rows.seed, **options)
        if options
        else recorded_epochs(recording, count, epochs, rows.seed)
    )
    for done in trained:
        if blocks is not None and not blocks.located:
            recording.begin()  # the checkpoint was the end of this epoch: no block was trained
        sampler.phase("evaluate")
        rows.epoch(
            "diverged" if done.diverged else "ok",
            images=done.images,
            epoch_seconds=done.seconds,
            event_seconds=engine.event_seconds,
            loss=done.loss,
            test_accuracy=accuracy(engine, dataset.test_images, dataset.test_labels),
        )
        recording.unchanged("an evaluation")
        if done.diverged:
            return
        sampler.phase("train")
    timed = min(config.measuring.latency_steps, steps)
    order = epoch_order(count, rows.seed, epochs + 1)[: timed * size]
    seconds = math.inf
    for step in range(timed):
        began = time.perf_counter()
        engine.train(order[step * size : (step + 1) * size])
        seconds = time.perf_counter() - began
        recording.noted()
        rows.step(seconds)
    recording.end(
        "the single steps", lambda: order, None, seconds=seconds,
        again=lambda: engine.train(order[:size]),
    )  # fmt: skip


def _part_of_epoch(count: int, seed: int, epoch: int, first: int, last: int) -> Order:
    return epoch_order(count, seed, epoch)[first:last]


class Blocks:
    """Records the first and the last block of a training that is done in blocks.

    To replay all of a training that takes hours would take hours too.
    """

    def __init__(
        self, recording: Recording, count: int, epochs: int, seed: int, *, known: bool
    ) -> None:
        self._recording, self._epochs, self._seed, self._count = recording, epochs, seed, count
        self._before = (1, 0) if known else None
        """Epoch and images of it done when the state was read last; None: that is not known."""

    @property
    def located(self) -> bool:
        """Whether the state that was read last is that of a known place in the training."""
        return self._before is not None

    def ended(self, state: State, steps: int) -> None:
        """A block has ended; `report` of training.train_epochs."""
        recording, before = self._recording, self._before
        if before is None:
            recording.begin()
        else:
            first = before[1] if before[0] == state.epoch else 0
            recording.end(
                f"a part of epoch {state.epoch}",
                partial(
                    _part_of_epoch, self._count, self._seed, state.epoch, first, state.images_done
                ),
                recording.engine.setup.schedule.rates(state.epoch, self._epochs, steps),
                by_units=True, done=first,
            )  # fmt: skip
            del recording.calls[1:-1]
        self._before = state.epoch, state.images_done


def _time_blocks(config: Config, rows: Rows, recording: Recording, dataset: Dataset) -> None:
    """Time single steps until their spread is small or sample_seconds are over; scale each.

    A block is one step of the engine. For an image-by-image stage the engine's batch may be smaller
    than the run's; the time of its update is measured apart and counted once a real step.
    """
    engine = recording.engine
    count, size = len(dataset.train_labels), engine.setup.batch_size
    batch_size = rows.run.batch_size
    steps = count // batch_size
    order = epoch_order(count, rows.seed, 1)
    update_seconds = 0.0
    if size < batch_size and isinstance(engine, ImageByImage):
        update_seconds = engine.time_update()
    times: list[float] = []
    recording.begin()
    ends = time.perf_counter() + config.measuring.sample_seconds
    while len(times) < count // size:
        block = order[len(times) * size : (len(times) + 1) * size]
        began = time.perf_counter()
        loss = engine.train(block)
        now = time.perf_counter()
        recording.noted()
        times.append(now - began)
        step_seconds = (times[-1] - update_seconds) * batch_size / size + update_seconds
        status = "ok" if math.isfinite(loss) else "diverged"
        rows.epoch(status, images=size, epoch_seconds=step_seconds * steps, loss=loss)
        rows.step(step_seconds)
        if status == "diverged" or now > ends or _settled(times):
            break
    recording.end(
        "the steps that were timed", lambda: order[: len(times) * size], None, seconds=times[-1],
        again=lambda: engine.train(block),
    )  # fmt: skip


def _settled(times: list[float]) -> bool:
    """Whether the median is known within SMALL_SPREAD: quartile distance over root n, as usual."""
    if len(times) < ENOUGH_BLOCKS:
        return False
    lower, middle, upper = statistics.quantiles(times, n=4)
    return (upper - lower) / math.sqrt(len(times)) < SMALL_SPREAD * middle


__all__ = ["ValidationFailed", "is_the_stages", "measure", "warm_up"]
