"""How much time and which batches a run may take, by the config's section `measuring`."""

import math

from cnnlib.config import Config
from cnnlib.engine import ImageByImage, Stage
from cnnlib.measuring.runs import Run, usual_batch_size


def engine_batches(config: Config, run: Run, stage: Stage) -> list[int]:
    """Batch sizes to build an engine for, in this order, until one is suitable for timing.

    The time per image of an image-by-image stage does not depend on the batch; only its update
    does, which is timed separately. Within a budget such a stage is therefore tried on a part of
    the run's batch first: it need not train on 4096 images to show how long they would take.
    """
    if issubclass(stage.engine, ImageByImage) and not config.measuring.full:
        return sorted({min(run.batch_size, config.measuring.budget_images), run.batch_size})
    return [run.batch_size]


def epochs_budget(config: Config, device_kind: str) -> float:
    """Seconds that all epochs of a run may take; a longer run is timed on a part of them.

    The times of GPU kernels that are emulated on the CPU are no guide to a GPU's speed, so there
    is no need to wait for a whole run.
    """
    measuring = config.measuring
    if measuring.full:
        return math.inf
    if device_kind == "emulated":
        return min(measuring.emulated_seconds, measuring.budget_seconds)
    return measuring.budget_seconds


def learning_budget(
    config: Config, batch_size: int, device_kind: str, *, extrapolated: bool
) -> float:
    """Seconds of training after which a learning curve ends.

    Where a machine is so slow that a CPU stage is extrapolated, its curve at the batch size that
    figures show may take as long as its epochs might have taken: figures extend the curves of
    other stages by it.
    """
    measuring = config.measuring
    if not extrapolated:
        return math.inf
    if device_kind == "emulated":
        return measuring.emulated_seconds
    if device_kind == "cpu" and batch_size == usual_batch_size(config):
        return max(measuring.budget_seconds, measuring.sample_seconds)
    return measuring.sample_seconds


def records_curve(
    config: Config, run: Run, engine_batch: int, device_kind: str, *, extrapolated: bool
) -> bool:
    """Whether a run is trained once more to record what the network knows at which moment.

    Repeats differ in their seed alone, so one curve is enough, and an engine for a part of the
    batch would learn something else. With emulated kernels a short curve takes seconds, which are
    spent only on the batch size that figures show.
    """
    drawn = run.batch_size == usual_batch_size(config)
    emulated = device_kind == "emulated" and extrapolated
    return run.repeat == 1 and engine_batch == run.batch_size and (drawn or not emulated)
