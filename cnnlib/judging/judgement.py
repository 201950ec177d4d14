"""A judgement from its first part to its last, each with a verdict as soon as it is known."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cnnlib.config import Config
from cnnlib.datasets import Dataset, noise
from cnnlib.device import KernelError
from cnnlib.engine import ImageByImage
from cnnlib.errors import DeviceError, UserError, WorkerDied, one_line
from cnnlib.judging import emulation, page, record, rivals, roofline, tools, tricks
from cnnlib.judging.record import Findings, Part, Word
from cnnlib.judging.remote import StageFailed, Worker
from cnnlib.judging.rivals import Arm, Course, Race, Say
from cnnlib.judging.spotlight import check_spotlight
from cnnlib.measuring.run import warm_up
from cnnlib.measuring.stage_check import CHECKED_IMAGES, CHECKED_STEPS, LEAST_STEPS
from cnnlib.network import Network
from cnnlib.system.machine import provenance
from cnnlib.training.loop import start
from cnnlib.training.target import open_engine, setup_of
from cnnlib.validation.verdicts import Unjudged, ValidationFailed

REJECTING = (ValidationFailed, StageFailed, WorkerDied, KernelError)
"""What says that a stage is wrong."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be judged, and how."""

    stage: str
    """The name of a stage, or a file."""
    dataset: str
    network: Network
    batch_size: int
    repeats: int
    images: int | None
    """Training images of a timed epoch; None: as many as take about a second."""
    seed: int
    against: tuple[str, ...] = ()
    """Further stages or files that are timed in turn."""
    rivals: bool = True
    """Whether the best shipped stage and the best peer are looked for."""
    parts: tuple[str, ...] = ()
    """Names of PARTS that are made; empty: all."""


class Judgement:
    """Goes through the parts and keeps what they find in the folder `out`."""

    def __init__(
        self, config: Config, wanted: Wanted, dataset: Dataset, out: Path, say: Say
    ) -> None:
        self.config, self.wanted, self.dataset, self.out, self.say = (
            config,
            wanted,
            dataset,
            out,
            say,
        )
        self._random = np.random.default_rng(wanted.seed)
        self._device = config.sweep.device
        self._limit = config.measuring.limit_seconds

    def make(self) -> Findings:
        """Make all parts, once the judgement is open."""
        for name, part in PARTS.items():
            if name in (self.wanted.parts or PARTS):
                self._make(name, part)
        self.findings.finished = True
        self._write()
        return self.findings

    def open(self) -> None:
        """Find out what the stage is, and that it serves the network here.

        Raises UserError otherwise: that is bad input, not a verdict.
        """
        wanted = self.wanted
        with self._worker() as worker:
            said, target = worker.described, worker.target
            self._kernels, self._by_image = bool(said["kernels"]), bool(said["by_image"])
            self._engine = str(said["engine"])
            setup = setup_of(self.config, wanted.network, self.dataset, 1)
            with open_engine(worker.stage, setup, worker.target):
                pass
        self.findings = Findings(
            str(said["name"]),
            str(said["title"]),
            wanted.stage,
            wanted.dataset,
            wanted.network.name,
            wanted.batch_size,
            wanted.seed,
            target.name,
            target.kind,
            provenance(),
            str(said["color"]),
            str(said["marker"]),
        )
        self.say(
            f"{self.findings.stage} on network {wanted.network.name}, data set {wanted.dataset}, "
            f"batch size {wanted.batch_size}, seed {wanted.seed}; {target.name}"
        )

    def _make(self, name: str, part: Callable[["Judgement"], tuple[Word, str, list[str]]]) -> None:
        self.say(f"{name} ...")
        began = time.perf_counter()
        try:
            word, text, details = part(self)
        except REJECTING as error:
            word, text, details = "REJECTED", one_line(error), []
        except Unjudged as error:
            word, text, details = "unjudged", one_line(error), []
        seconds = time.perf_counter() - began
        self.findings.parts.append(Part(name, word, " ".join(text.split()), seconds, details))
        self._write()
        self.say(f"{name}: {word}: {text} ({seconds:.1f} s)")

    def _write(self) -> None:
        record.write(self.out, self.findings)
        page.write(self.out / record.PAGE, self.findings)

    def _worker(self, device: str = "") -> Worker:
        return Worker(self.wanted.stage, device or self._device, limit=self._limit)

    def seed(self) -> int:
        """A seed that no process of the stage could know before."""
        return int(self._random.integers(2**31))

    def _noise(self) -> tuple[Dataset, int]:
        """Images of noise for a check, and a batch size that a slow stage can do."""
        wanted, network = self.wanted, self.wanted.network
        batch_size, most = wanted.batch_size, CHECKED_IMAGES
        if self._by_image:
            batch_size, most = min(batch_size, self.config.measuring.budget_images), 0
        steps = min(CHECKED_STEPS, max(LEAST_STEPS, most // batch_size))
        data = noise(wanted.dataset, network.input_shape, network.classes, steps * batch_size + 1)
        random = np.random.default_rng(self.seed())
        images = random.integers(0, 256, data.train_images.shape, dtype=np.uint8)
        labels = random.integers(0, min(network.classes, 256), len(images), dtype=np.uint8)
        return dataclasses.replace(data, train_images=images, train_labels=labels), batch_size

    def check(self) -> tuple[Word, str, list[str]]:
        """Parity with the reference, whole steps, and epochs that are replayed."""
        data, batch_size = self._noise()
        setup = setup_of(self.config, self.wanted.network, data, batch_size)
        with self._worker() as worker:
            share = tricks.check_epochs(worker.stage, setup, worker.target, data, self.seed())
        return (
            "right",
            f"its largest error is {share:.2g} of what is allowed",
            [
                f"engine {self._engine}, in a process of its own",
                f"loss and gradient of a batch of {batch_size} against a float64 reference",
                "whole steps with momentum against gradient descent written out in float64",
                "2 epochs, replayed in calls of 1, 2, 4, ... steps",
                "weights that stay while the network is evaluated",
            ],
        )

    def tricks(self) -> tuple[Word, str, list[str]]:
        """Known ways to look fast."""
        data, batch_size = self._noise()
        network, count = self.wanted.network, len(data.train_labels)
        setup = setup_of(self.config, network, data, batch_size)
        random = np.random.default_rng(self.seed())
        with self._worker() as worker:
            stage = worker.stage
            if not self._by_image:  # one image at a time leaves nothing to hurry through
                check_spotlight(stage, setup, worker.target, data, random)
            with open_engine(stage, setup, worker.target, data) as engine:
                asked = tricks.check_declared(engine)
                tricks.check_outputs(engine, data.train_images, data.train_labels, random)
                if not isinstance(engine, ImageByImage):
                    start(engine, self.seed())
                    tricks.check_at_rest(engine, count, self.seed())
                    tricks.check_memory(engine, count, self.seed())
                    tricks.check_late_steps(engine, count, self.seed())
                tricks.check_clock(engine)
        left = tricks.OF_WHOLE_BATCHES if self._by_image else ()
        done = [f"{name}: {what}" for name, what in tricks.CHECKS.items() if name not in left]
        return "right", f"none of the known tricks; it asks for: {asked}", done

    def emulation(self) -> tuple[Word, str, list[str]]:
        """Sanitizers and both orders of threads, where kernels are the stage's own."""
        if not self._kernels:
            return (
                "not done",
                f"engine {self._engine} has no kernels that can be compiled for the CPU",
                [],
            )
        try:
            networks = [*emulation.awkward_networks(), self.wanted.network]
            found = emulation.check_emulated(self.wanted.stage, networks, self.out, self._limit)
        except DeviceError as error:
            if isinstance(error, WorkerDied):
                raise
            return "not done", one_line(error), []
        text = (
            f"nothing to report, and the same bits in both orders, on {', '.join(found.networks)}"
        )
        checks = ["addresses", "undefined behaviour", "threads and blocks forward and in reverse"]
        return "right", text, [*checks, *(f"declined {each}" for each in found.declined)]

    def compute_sanitizer(self) -> tuple[Word, str, list[str]]:
        """NVIDIA's checker on a GPU."""
        # The driver is not asked: CUDA must not be initialised in this process, which forks.
        if self.findings.device_kind != "cuda":
            return "not done", f"it runs on no GPU here, but on {self.findings.device}", []
        tool = tools.find_tool("compute-sanitizer")
        if tool is None:
            return "not done", "compute-sanitizer is neither on PATH nor in the CUDA toolkit", []
        tools.check_compute_sanitizer(
            tool, self.wanted.stage, self.wanted.network, self.out, self._limit
        )
        return "right", "nothing to report", list(tools.SANITIZER_TOOLS)

    def times(self) -> tuple[Word, str, list[str]]:
        """Epochs in turn with the best shipped stage and the best peer."""
        if self.findings.rejected:
            return "not done", "the times of a stage that a check did not accept mean nothing", []
        findings, wanted = self.findings, self.wanted
        judged = Arm(wanted.stage, "judged", self._device, findings.stage)
        course = self._course(judged)
        findings.images = course.count
        if not self._by_image:
            self._check_course(course, judged)
        kind = findings.device_kind
        known = {findings.stage, *wanted.against}
        possible = rivals.candidates(kind, known) if wanted.rivals else []
        others, out = rivals.quickest(course, possible, self.seed(), self.say)
        others += [Arm(name, "stage", self._device) for name in wanted.against]
        race = Race(findings.timings, findings.profile, {})
        rivals.run(course, [judged, *others], wanted.repeats, self.seed, race, self.say)
        findings.profile = race.profile
        ratios = [rivals.ratio(race, judged, other) for other in others]
        findings.ratios = [ratio for ratio in ratios if ratio is not None]
        own = statistics.median(race.times(judged))
        text = f"{1e3 * own:.4g} ms for {course.count} images"
        for ratio in findings.ratios:
            text += f"; {ratio.factor:.3g} times as fast as {ratio.other.name}"
            if ratio.low == ratio.low:
                text += f" ({ratio.low:.3g} to {ratio.high:.3g})"
        if kind == "emulated":
            text += "; emulated: no guide to a GPU's speed"
        left = [f"no rival: {', '.join(names)}: {why}" for why, names in out.items()]
        left += [f"dropped out: {name}: {why}" for name, why in race.failures.items()]
        if wanted.rivals and not any(other.role == "stage" for other in others):
            left.append("no other shipped stage trains this on such a device")
        if wanted.rivals and not any(other.role == "peer" for other in others):
            left.append("no peer is comparable here" if kind == "emulated" else "no peer runs here")
        return "measured", text, left

    def _check_course(self, course: Course, judged: Arm) -> None:
        """One step that matters among those of a call as long as the timed ones, on their data."""
        setup = setup_of(self.config, course.network, course.dataset, course.batch_size)
        random = np.random.default_rng(self.seed())
        with course.worker(judged) as worker:
            check_spotlight(worker.stage, setup, worker.target, course.dataset, random)

    def _course(self, judged: Arm) -> Course:
        """The data of the timed epochs: permuted, and as many as take about a second."""
        wanted, data = self.wanted, self.dataset
        order = np.random.default_rng(self.seed()).permutation(len(data.train_labels))

        def first(count: int) -> Dataset:
            return dataclasses.replace(
                data,
                train_images=data.train_images[order[:count]],
                train_labels=data.train_labels[order[:count]],
            )

        whole = Course(self.config, wanted.network, first(len(order)), wanted.batch_size)
        if wanted.images is not None:
            return Course(self.config, wanted.network, first(wanted.images), wanted.batch_size)
        with whole.worker(judged) as worker, whole.open(worker, worker.stage) as engine:
            start(engine, self.seed())
            each = warm_up(whole.config, engine, whole.dataset, self.seed())
        count = max(rivals.EPOCH_SECONDS / each, rivals.LEAST_STEPS * wanted.batch_size)
        return Course(
            self.config, wanted.network, first(min(len(order), int(count))), wanted.batch_size
        )

    def counters(self) -> tuple[Word, str, list[str]]:
        """What ncu counts of the kernels of two steps."""
        if self.findings.rejected:
            return "not done", "a check did not accept the stage", []
        if self.findings.device_kind != "cuda":
            return "not done", "there is no GPU whose counters could be read", []
        tool = tools.find_tool("ncu")
        if tool is None:
            return "not done", "ncu is neither on PATH nor in the CUDA toolkit", []
        wanted = self.wanted
        try:
            found = tools.count(
                tool,
                wanted.stage,
                wanted.network,
                wanted.batch_size,
                self.out / "ncu.log",
                self._limit,
            )
        except UserError as error:  # such as counters that only an administrator may read
            return "not done", one_line(error), []
        self.findings.counters = found
        longest = found[0]
        return (
            "measured",
            f"{len(found)} kernels; most of the time goes to {longest.kernel}",
            [f"ncu: {', '.join(tools.METRICS)}"],
        )

    def roofline(self) -> tuple[Word, str, list[str]]:
        """Its point in the roofline, beside those of its rivals."""
        findings, wanted = self.findings, self.wanted
        if not findings.timings:
            return "not done", "there are no times", []
        setup = setup_of(self.config, wanted.network, self.dataset, wanted.batch_size)
        for arm in record.arms(findings):
            each = statistics.median(t.seconds / t.images for t in findings.timings if t.arm == arm)
            findings.points.append(roofline.point(str(arm), wanted.network, setup, each))
        own = findings.points[0]
        text = f"{own.intensity:.3g} operations per byte, {_rate(own.rate)}"
        if findings.device_kind == "emulated":
            return "measured", f"{text}; emulated: a GPU's limits say nothing about it", []
        findings.limits = roofline.limits(findings.device_kind)
        most = findings.limits.attainable(own.intensity)
        text += f", {100 * own.rate / most:.2g} % of what this machine attains there"
        return "measured", text, []


def _rate(rate: float) -> str:
    for size, unit in ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate:.3g} FLOP/s"


PARTS: dict[str, Callable[[Judgement], tuple[Word, str, list[str]]]] = {
    "check": Judgement.check,
    "tricks": Judgement.tricks,
    "emulation": Judgement.emulation,
    "compute-sanitizer": Judgement.compute_sanitizer,
    "times": Judgement.times,
    "counters": Judgement.counters,
    "roofline": Judgement.roofline,
}
