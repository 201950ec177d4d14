"""One measurement: check, warm up, time epochs and single steps, check them, write the rows.

An epoch runs from before its order is drawn until its last update is visible to the host:
shuffling, gathering, every transfer the stage needs, compute, update. Compiling, loading the data
set into host memory, validation, warm-up and evaluation are outside.
"""

import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.device import KernelError
from cnnlib.engine import Engine, ImageByImage, Order, Setup
from cnnlib.errors import DoesNotFit, Unsupported, UserError, WorkerDied
from cnnlib.files import check_writable
from cnnlib.measuring import budgets, energy
from cnnlib.measuring.disturbances import TIMED_IN, mark_disturbed
from cnnlib.measuring.kept import Cell, Kept
from cnnlib.measuring.learning_curve import learning_curve, watched_images
from cnnlib.measuring.long_runs import CheckpointPolicy, ChunkRecorder
from cnnlib.measuring.record import RunFacts, RunRecord, engine_facts, origin_of, run_files
from cnnlib.measuring.rows import RunRows
from cnnlib.measuring.runs import Run, seed_of, settings_digest
from cnnlib.measuring.telemetry import Telemetry
from cnnlib.stages import find_stage
from cnnlib.system.interrupts import Stopped, time_limit
from cnnlib.system.supervisor import supervised
from cnnlib.system.turns import Turn, changes_turn, take_turn, turns
from cnnlib.training.checkpoint import read_notes
from cnnlib.training.loop import Epoch, accuracy, batches, epoch_order, start, train_epochs
from cnnlib.training.target import check_batch, open_engine, open_target, setup_of
from cnnlib.validation.replay import Recording, TimedCall, recorded_epochs
from cnnlib.validation.trajectory import check_after, check_before, check_momentum
from cnnlib.validation.verdicts import Unjudged, ValidationFailed, failure

ENOUGH_SAMPLES = 5
"""Samples of an extrapolated run, at least, before their spread is looked at."""
_CLOCK: Final = time.perf_counter
"""The clock as it was before a stage from outside could have changed it."""
TURN: Final[dict[str, Turn]] = dict.fromkeys(("warm_up", "evaluate", "confirm", *TIMED_IN), "alone")
"""Phases in which no other run of a sweep is active; in all others they may be."""
UNTIMED_PACE = 0.25
"""Seconds between two looks at the sensors while a run of a sweep is not alone: another one may be
timed.
"""
SMALL_SPREAD = 0.02
"""Spread of the samples, relative to their median, at which sampling ends early."""


def measure(
    config: Config,
    run: Run,
    dataset: Dataset,
    folder: Path,
    *,
    checkpoints: Path | None = None,
    stop: Callable[[], int] = lambda: 0,
    mark: bool = False,
    kept: Kept | None = None,
) -> Path:
    """Measure `run` and write its tables (schema.RUN_TABLES) and run.json into `folder`.

    A run in full that takes longer than measuring.budget_seconds is saved in the folder
    `checkpoints` every half minute and resumed from there (run.json then has `resumed`), if
    neither the settings nor the code have changed; `stop` is that of training.loop.train_epochs.

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

    With `kept`, what another run of the same stage has left open in this process is used.
    """
    measurement = Measurement(config, run, dataset, folder, kept)
    policy = CheckpointPolicy.of(config, run, checkpoints, stop)
    measurement.check_inputs(policy)
    with measurement.opened(mark), measurement.outcome(mark):
        with measurement.pick_batch() as engine:
            recording = measurement.time_training(engine, policy)
            if measurement.rows.trained:
                measurement.profile(recording)
                measurement.learning_curve(recording)
                measurement.energy(engine)
            measurement.validate_timed(recording)
        measurement.validate_momentum(engine.setup)
        measurement.rows.vouch()
    measurement.write(policy)
    return folder


class Measurement:
    """What one run is measured from, and the rows and facts found so far."""

    def __init__(
        self,
        config: Config,
        run: Run,
        dataset: Dataset,
        folder: Path,
        kept: Kept | None = None,
    ) -> None:
        self._kept: Final = kept
        self.config: Final = config
        self.run: Final = run
        self.dataset: Final = dataset
        self.folder: Final = folder
        self.stage: Final = find_stage(run.stage, "--stage")
        self.network: Final = config.network(run.network, run.dataset, "--network")
        self.rows: Final = RunRows(run, seed_of(config, run.repeat))
        settings = settings_digest(config, run, self.stage.runs_on)
        self.record: Final = RunRecord(config, self.rows, settings, origin_of(self.stage))
        count = len(dataset.train_labels)
        dropped = count % run.batch_size
        self.facts["epoch_images"], self.facts["dropped_images"] = count - dropped, dropped
        self._whole_seconds = math.nan
        """Estimated time of all epochs."""
        self._sustained_images = 0
        self._failed = False

    @property
    def facts(self) -> RunFacts:
        return self.record.facts

    def phase(self, name: str) -> None:
        """Begin a phase of the run, and wait for its turn where runs are prepared side by side."""
        turn = TURN.get(name, "preparing")
        if changes_turn(turn):
            self._telemetry.phase("wait")
            take_turn(turn)
            self._telemetry.pace(0.0 if turn == "alone" else UNTIMED_PACE)
        self._telemetry.phase(name)

    def check_inputs(self, policy: CheckpointPolicy) -> None:
        """Raise UserError now for what would fail hours later."""
        check_batch(self.dataset, self.run.batch_size)
        check_writable(*run_files(self.folder))
        if policy.file is not None:
            check_writable(policy.file)

    @contextmanager
    def opened(self, mark: bool) -> Iterator[None]:
        """Open the telemetry and the device, and limit the time that the run may take."""
        sharing, sweep = turns(), None
        if sharing is not None:
            self.facts["preparing"], sweep = sharing.preparing, sharing.owner
        kept, device = self._kept, self.config.sweep.device
        sensors = kept.sensors if kept else None
        with (
            Telemetry(self.config.measuring.sample_interval, sweep, sensors) as telemetry,
            self._time_limit(mark),
            self._taking_turns(telemetry),
            (kept.target if kept else open_target)(self.stage, device) as target,
        ):
            self._target = target
            self.rows.device, self.rows.device_kind = target.name, target.kind
            telemetry.attach(target.pci_bus_id)
            yield

    @contextmanager
    def _taking_turns(self, telemetry: Telemetry) -> Iterator[None]:
        """Wait until the run may be prepared, and leave the machine to other runs at the end."""
        self._telemetry = telemetry
        if changes_turn("preparing"):
            self.phase("open")
        try:
            yield
        finally:
            take_turn("away")

    @contextmanager
    def _time_limit(self, mark: bool) -> Iterator[None]:
        """End the process when a run takes too long, unless it is in full or supervised.

        A supervisor ends hanging runs more reliably than the process itself.
        """
        limit = self.config.measuring.limit_seconds
        why = (
            f"stage '{self.run.stage}' hangs: {self.run.folder} took longer than "
            f"measuring.limit_seconds, {limit:g} s"
        )

        def hung() -> int:
            print(f"error: {why}", file=sys.stderr, flush=True)
            if not mark:
                return 1
            self.record.write_failure(self.folder, why)
            return 0

        if self.config.measuring.full or supervised():
            yield
            return
        with time_limit(limit, hung):
            yield

    @contextmanager
    def outcome(self, mark: bool) -> Iterator[None]:
        """Turn exceptions that are results into rows; with `mark`, failures of the stage too."""
        rows, facts = self.rows, self.facts
        try:
            yield
        except (DoesNotFit, MemoryError) as error:
            facts["does_not_fit"] = str(error) or "out of memory"
            rows.add_epoch("does_not_fit", reason=facts["does_not_fit"])
        except Unsupported as error:
            facts["unavailable"] = str(error)
            rows.add_epoch("unavailable", reason=str(error))
        except Unjudged as error:
            facts["unjudged"] = str(error)
            rows.discard("unjudged", str(error))
        except Exception as error:
            if not mark or not blames_stage(error):
                raise
            if not isinstance(error, ValidationFailed):  # whose message says everything
                traceback.print_exc()
            self.record.write_failure(self.folder, f"{type(error).__name__}: {error}")
            self._failed = True

    @contextmanager
    def pick_batch(self) -> Iterator[Engine]:
        """Open the engine that is to be timed, validated and warm, with its initial weights.

        An engine for a part of the run's batch is closed again if all epochs fit into the budget:
        whole epochs are trained on whole batches.
        """
        budget = budgets.epochs_budget(self.config, self.rows.device_kind)
        for size in budgets.engine_batches(self.config, self.run, self.stage):
            setup = setup_of(self.config, self.network, self.dataset, size, self.rows.seed)
            with self._engine(setup) as engine:
                self.facts.update(engine_facts(engine, self._target))
                self.validate(engine)
                self.warm_up(engine)
                self.rows.extrapolated = self._whole_seconds > budget
                if size == self.run.batch_size or self.rows.extrapolated:
                    yield engine
                    return

    @contextmanager
    def _engine(self, setup: Setup) -> Iterator[Engine]:
        """A new engine or, if there is one, that of another repeat, with its dataset loaded."""

        def make() -> AbstractContextManager[Engine]:
            return open_engine(self.stage, setup, self._target, self.dataset)

        if self._kept is None:
            with make() as engine:
                yield engine
            return
        cell = None if self.network.drops_out else self._cell(setup.batch_size)
        measured = self._cell(self.run.batch_size)
        if others := len(self._kept.cells - {measured}):
            self.facts["cells_before"] = others
        self._kept.cells.add(measured)
        with self._kept.engine(cell, self.run.repeat, make) as (engine, repeat):
            if repeat != self.run.repeat:
                self.facts["engine_of_repeat"] = repeat
            yield engine

    def _cell(self, batch_size: int) -> Cell:
        return self.run.dataset, self.run.network, self.run.stage, batch_size

    def validate(self, engine: Engine) -> None:
        """Check the stage before its clock starts; raises ValidationFailed or Unjudged."""
        with self._checking("before"):
            start(engine, self.rows.seed)
            images, labels = self.dataset.train_images, self.dataset.train_labels
            check_before(engine, images, labels, self.rows.seed)
            engine.logits(self.dataset.test_images[:1])  # so that no evaluation compiles anything

    @contextmanager
    def _checking(self, kind: str) -> Iterator[None]:
        """Note how long the checks inside take, for run.json."""
        self.phase("validate")
        began = time.perf_counter()
        try:
            yield
        finally:
            self.record.checking_seconds[kind] = time.perf_counter() - began

    def warm_up(self, engine: Engine) -> None:
        """Train until caches and clocks have settled, then go back to the initial weights."""
        self.phase("warm_up")
        start(engine, self.rows.seed)
        seconds_per_image = warm_up(self.config, engine, self.dataset, self.rows.seed)
        start(engine, self.rows.seed)
        count = len(self.dataset.train_labels)
        self._whole_seconds = seconds_per_image * count * self.config.training.epochs

    def time_training(self, engine: Engine, policy: CheckpointPolicy) -> Recording:
        """Time the run's epochs, or a sample of steps where they would take too long."""
        recording = Recording(engine)
        self.phase("train")
        if self.rows.extrapolated:
            self.time_sample(recording)
            return recording
        if self._whole_seconds <= self.config.measuring.budget_seconds:
            policy.file = None  # saving so short a run would only disturb it
        self.time_epochs(recording, policy)
        if self.rows.trained or not self.rows["epochs"]:
            self.time_steps(recording)
        return recording

    def time_epochs(self, recording: Recording, policy: CheckpointPolicy) -> None:
        """Time all epochs, with an evaluation off the clock after each of them."""
        engine = recording.engine
        for done in self._trained_epochs(recording, policy):
            self.phase("evaluate")
            self.rows.add_epoch(
                "diverged" if done.diverged else "ok",
                images=done.images,
                epoch_seconds=done.seconds,
                event_seconds=engine.event_seconds,
                loss=done.loss,
                test_accuracy=accuracy(engine, self.dataset.test_images, self.dataset.test_labels),
            )
            recording.unchanged("an evaluation")
            if not done.diverged:
                self.phase("train")

    def _trained_epochs(self, recording: Recording, policy: CheckpointPolicy) -> Iterator[Epoch]:
        """Train all epochs, recorded for a replay; in chunks if the run is saved as it goes."""
        count, seed, epochs = len(self.dataset.train_labels), self.rows.seed, self._epochs
        if policy.file is None:
            recording.begin()
            yield from recorded_epochs(recording, count, epochs, seed)
            return
        rows = self.rows["epochs"]
        if policy.file.exists():
            rows[:] = json.loads(read_notes(policy.file) or "[]")
            policy.resumed = True
        chunks = ChunkRecorder(recording, count, epochs, seed, resumed=policy.resumed)
        recording.begin()
        for done in train_epochs(
            recording.engine,
            count,
            epochs,
            seed,
            checkpoint=policy.file,
            stop=policy.stop,
            notes=lambda: json.dumps(rows),
            report=chunks.chunk_ended,
        ):
            chunks.resume_epoch()
            yield done

    @property
    def _epochs(self) -> int:
        return self.config.training.epochs

    def time_steps(self, recording: Recording) -> None:
        """Time single steps of a further epoch."""
        engine, size = recording.engine, recording.engine.setup.batch_size
        count = len(self.dataset.train_labels)
        timed = min(self.config.measuring.latency_steps, count // size)
        order = epoch_order(count, self.rows.seed, self._epochs + 1)[: timed * size]
        times: list[float] = []
        for chunk in batches(order, size=size):
            began = time.perf_counter()
            engine.train(chunk.order)
            times.append(time.perf_counter() - began)
            recording.noted()
            self.rows.add_step(times[-1])
        recording.end(single_steps("the single steps", engine, order, times))

    def time_sample(self, recording: Recording) -> None:
        """Time single steps until their spread is small or sample_seconds are over; scale each.

        A sample is one step of the engine. The batch of an image-by-image stage's engine may be
        smaller than the run's; the time of its update is then measured separately and counted once
        a real step.
        """
        engine, size = recording.engine, recording.engine.setup.batch_size
        count, batch_size = len(self.dataset.train_labels), self.run.batch_size
        steps = count // batch_size
        order = epoch_order(count, self.rows.seed, 1)
        update_seconds = 0.0
        if size < batch_size and isinstance(engine, ImageByImage):
            update_seconds = engine.time_update()
        times: list[float] = []
        recording.begin()
        ends = time.perf_counter() + self.config.measuring.sample_seconds
        for sample in batches(order, size=size):
            began = time.perf_counter()
            loss = engine.train(sample.order)
            now = time.perf_counter()
            recording.noted()
            times.append(now - began)
            step_seconds = (times[-1] - update_seconds) * batch_size / size + update_seconds
            status = "ok" if math.isfinite(loss) else "diverged"
            self.rows.add_epoch(status, images=size, epoch_seconds=step_seconds * steps, loss=loss)
            self.rows.add_step(step_seconds)
            if status == "diverged" or now > ends or is_settled(times):
                break
        trained = order[: len(times) * size]
        recording.end(single_steps("the steps that were timed", engine, trained, times))

    def validate_timed(self, recording: Recording) -> None:
        """Check the timed training by a replay, and steps from the weights it ended with.

        The learning curve of the first repeat was a replay of the epochs by itself.
        """
        if time.perf_counter is not _CLOCK:
            raise failure(recording.engine, "it has replaced time.perf_counter, the clock")
        replayed = self._epochs if self._replays_epochs(recording) else 0
        if turns() is not None:
            self.phase("confirm")
            recording.confirm_late()  # while the run is still alone
        with self._checking("after"):
            images, labels = self.dataset.train_images, self.dataset.train_labels
            check_after(recording, images, labels, self.rows.seed, replayed)

    def _replays_epochs(self, recording: Recording) -> bool:
        """Whether the learning curve passes through the states in which the timed epochs ended."""
        return (
            self.rows.trained
            and self.run.repeat == 1
            and not self.rows.extrapolated
            and self.stage.repeatable
            and [call.timed.epoch for call in recording.calls if call.timed.epoch]
            == list(range(1, self._epochs + 1))
        )

    def profile(self, recording: Recording) -> None:
        """Time each kernel of a training step on its own."""
        self.phase("profile")
        for kernel in recording.engine.profile():
            values = kernel._asdict()
            self.rows.add_measured("kernels", kernel_seconds=values.pop("seconds"), **values)
        recording.unchanged("a profile")

    def learning_curve(self, recording: Recording) -> None:
        """Train once more, if this run is the one to do so, and record what the network knows."""
        config, rows, engine = self.config, self.rows, recording.engine
        size, kind, extrapolated = engine.setup.batch_size, rows.device_kind, rows.extrapolated
        if not budgets.records_curve(config, self.run, size, kind, extrapolated=extrapolated):
            return
        self.phase("learn")
        replays = self._replays_epochs(recording)
        hard = config.dataset(self.run.dataset, "--dataset").hard_images
        points, predictions = learning_curve(
            engine,
            self.dataset,
            watched_images(self.dataset, hard),
            seed=rows.seed,
            epochs=self._epochs,
            test_images=config.measuring.learning_images,
            budget_seconds=budgets.learning_budget(
                config, self.run.batch_size, kind, extrapolated=extrapolated
            ),
            ended=recording.reached if replays else None,
        )
        whole = len(self.dataset.train_labels) // size * size * self._epochs
        if replays and int(points[-1]["images"]) < whole:
            recording.check()  # a curve that ended early has not replayed all of the epochs
        for point in points:
            rows.add_measured("learning", **point)
        for prediction in predictions:
            rows.add_measured("predictions", **prediction)

    def energy(self, engine: Engine) -> None:
        """Train on a GPU without a pause for energy_seconds, while its energy is read."""
        seconds = self.config.measuring.energy_seconds
        if self.rows.device_kind != "cuda" or not seconds:
            return
        self.phase(energy.PHASE)
        count = len(self.dataset.train_labels)
        self._sustained_images = energy.sustain(engine, count, self.rows.seed, seconds)

    def validate_momentum(self, setup: Setup) -> None:
        """Check steps with a momentum where the experiment trains without any."""
        checked = self._kept.momentum_checked if self._kept else set[Cell]()
        if (
            not self.config.training.momentum
            and (cell := self._cell(setup.batch_size)) not in checked
        ):
            with self._checking("momentum"):
                check_momentum(self.stage, setup, self._target, self.dataset, self.rows.seed)
            checked.add(cell)

    def write(self, policy: CheckpointPolicy) -> None:
        """Add what the telemetry saw and write the run's files, unless a failure was written."""
        if self._failed:
            return
        for sample in self._telemetry.record.rows():
            self.rows.add_measured("samples", **sample)
        if self.rows.trained:
            row = energy.energy_row(self._telemetry.record, self._sustained_images)
            self.rows.add_measured("energy", **row)
        self.facts.update(mark_disturbed(self.rows, self._telemetry.record))
        if policy.resumed:
            self.facts["resumed"] = True
        self.record.write(self.folder)
        policy.finished()


def blames_stage(error: Exception) -> bool:
    """Whether an exception says that the stage failed: not bad input, not a request to stop."""
    if isinstance(error, (ValidationFailed, KernelError, WorkerDied)):
        return True
    return not isinstance(error, (UserError, Stopped))


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


def single_steps(what: str, engine: Engine, order: Order, times: Sequence[float]) -> TimedCall:
    """Describe the steps on `order` that were timed one by one, without reading the state between.

    Their times count together. Reading a state of many arrays takes as long as a step does on a
    GPU, and differs by as much from one time to the next, so that one step alone would look late
    now and then. Work that each step leaves to the one after it is in the sum, except that of the
    last.
    """
    size = engine.setup.batch_size

    def again() -> None:
        for step in batches(order, size=size):
            engine.train(step.order)

    return TimedCall(what, lambda: order, seconds=sum(times), again=again)


def is_settled(times: list[float]) -> bool:
    """Whether the median of `times` is known within SMALL_SPREAD.

    The uncertainty is taken to be the interquartile range over the square root of their number.
    """
    if len(times) < ENOUGH_SAMPLES:
        return False
    lower, middle, upper = statistics.quantiles(times, n=4)
    return (upper - lower) / math.sqrt(len(times)) < SMALL_SPREAD * middle


__all__ = ["Measurement", "ValidationFailed", "blames_stage", "measure", "warm_up"]
