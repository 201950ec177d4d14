"""Every stage of a sweep checked against the reference, without timing anything."""

from collections.abc import Iterator
from dataclasses import dataclass

from cnnlib.config import Config
from cnnlib.datasets import noise
from cnnlib.device import KernelError
from cnnlib.engine import ImageByImage
from cnnlib.errors import (
    BrokenStage,
    DeviceError,
    DoesNotFit,
    Unsupported,
    WorkerDied,
    one_line,
)
from cnnlib.measuring.cards import card_of
from cnnlib.stages import find_stage
from cnnlib.system.supervisor import Died, supervise
from cnnlib.training.target import open_target, setup_of
from cnnlib.validation.trajectory import check_training
from cnnlib.validation.verdicts import Unjudged

CHECKED_STEPS, LEAST_STEPS = 20, 3
"""Most and least number of steps in an epoch of a check."""
CHECKED_IMAGES = 2048
"""Images in an epoch of a check, unless they would make too few steps."""

VERDICTS: dict[type[Exception], str] = {
    BrokenStage: "broken",
    Unjudged: "unjudged",
    DoesNotFit: "does not fit",
    WorkerDied: "died",
    KernelError: "FAILED",
    DeviceError: "unavailable",
    Unsupported: "unavailable",
}
"""The first that an exception is an instance of counts; any other exception is FAILED."""


@dataclass(frozen=True)
class Case:
    """A stage, trained on one network at one batch size."""

    stage: str
    dataset: str
    network: str
    batch_size: int


@dataclass(frozen=True)
class Verdict:
    """The outcome of one case."""

    case: Case
    word: str
    """ok, skipped, hung, died, or one of VERDICTS."""
    share: float | None = None
    """Largest error as a share of what is allowed, where the stage is right."""
    problem: str = ""
    """What is wrong, in one line."""


def cases(config: Config) -> list[Case]:
    """Every case of the sweep; raises ConfigError for names that the config does not define."""
    sweep = config.sweep
    stages = []
    for entry in sweep.stages:
        try:
            stages.append(card_of(entry, "sweep.stages").name)
        except BrokenStage:  # becomes a verdict
            stages.append(entry)
    for dataset, network in config.pairs():
        config.network(network, dataset, "sweep.networks")
    return [
        Case(stage, dataset, network, batch_size)
        for dataset, network in config.pairs()
        for stage in stages
        for batch_size in sweep.batch_sizes
    ]


def verdicts(config: Config) -> Iterator[Verdict]:
    """Judge each case in a process of its own, for at most measuring.limit_seconds.

    Further batch sizes of a stage that has hung are skipped: they would only take the limit again.
    """
    hung = set()
    for case in cases(config):
        alike = (case.stage, case.dataset, case.network)
        verdict = Verdict(case, "skipped") if alike in hung else judge(config, case)
        if verdict.word == "hung":
            hung.add(alike)
        yield verdict


def judge(config: Config, case: Case) -> Verdict:
    """Check one case in a process of its own."""
    limit = config.measuring.limit_seconds
    at = f"stage '{case.stage}', network '{case.network}', batch size {case.batch_size}"
    try:
        share = supervise(lambda: largest_error(config, case), limit=limit)
    except Died as died:
        if died.kind == "hung":
            problem = f"{at}: {died} (measuring.limit_seconds is {limit:g} s)"
            return Verdict(case, "hung", problem=problem)
        return Verdict(case, "died" if died.kind == "died" else "FAILED", problem=f"{at}: {died}")
    except Exception as error:
        words = (word for kind, word in VERDICTS.items() if isinstance(error, kind))
        return Verdict(case, next(words, "FAILED"), problem=one_line(error))
    return Verdict(case, "ok", share)


def largest_error(config: Config, case: Case) -> float:
    """Largest error of a stage as a share of what is allowed, trained on noise for images.

    The checks are those of a measurement. Raises whatever is wrong with the stage.
    """
    network = config.network(case.network, case.dataset, "sweep.networks")
    stage = find_stage(case.stage, "sweep.stages")
    batch_size, most = case.batch_size, CHECKED_IMAGES
    if issubclass(stage.engine, ImageByImage):  # a batch takes it seconds, and a part is enough
        batch_size, most = min(batch_size, config.measuring.budget_images), 0
    steps = min(CHECKED_STEPS, max(LEAST_STEPS, most // batch_size))
    # One image more than whole batches, which is left over.
    images = noise(case.dataset, network.input_shape, network.classes, steps * batch_size + 1)
    setup = setup_of(config, network, images, batch_size)
    with open_target(stage, config.sweep.device) as target:
        return check_training(stage, setup, target, images, config.training.seed)
