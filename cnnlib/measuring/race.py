"""How soon a stage reaches an accuracy: one recipe, trained from many seeds, on the clock.

The recipe (network, batch size, training) is the config's section `race`. Whoever writes it must
choose it without looking at the test set; here it is only executed. Peers run the same recipe.
"""

import sys
import traceback
from pathlib import Path

from cnnlib.config import Config, Race
from cnnlib.datasets import Dataset
from cnnlib.errors import ConfigError, DoesNotFit, Unsupported
from cnnlib.measuring import schema
from cnnlib.measuring.rows import RunRows
from cnnlib.measuring.run import blames_stage, warm_up
from cnnlib.measuring.runs import Run
from cnnlib.measuring.schema import Row
from cnnlib.stages import find_stage
from cnnlib.system.supervisor import note
from cnnlib.training.loop import accuracy, start
from cnnlib.training.target import check_batch, open_engine, open_target, setup_of
from cnnlib.validation.replay import Recording, recorded_epochs
from cnnlib.validation.trajectory import check_after, check_before, check_momentum
from cnnlib.validation.verdicts import Unjudged, ValidationFailed


def seeds(race: Race) -> range:
    """Seeds of the race's trainings: race.seeds of them, beginning with the recipe's own."""
    return range(race.training.seed, race.training.seed + race.seeds)


def race_rows(race: Race, stage: str, seed: int, device: str, device_kind: str) -> RunRows:
    """Rows of the training from `seed`, which is the race's repeat number 1, 2, ..."""
    repeat = seed - race.training.seed + 1
    run = Run(race.dataset, race.network, stage, race.batch_size, repeat)
    return RunRows(run, seed, device, device_kind)


def run_race(config: Config, stage_name: str, dataset: Dataset, out: Path) -> list[Row]:
    """Train race.seeds times by the stage and write the rows of `race` to `out`; the rows.

    The stage is checked before the first training, and all trainings are replayed after the last
    one, as in every measurement. The clock of an epoch is that of every measurement too; evaluating
    the test images is off it. A stage that cannot run here, or trains wrongly, gives one row with
    the reason. Raises ConfigError where the config has no race.
    """
    race = require_race(config)
    stage = find_stage(stage_name, "--stage")
    network = config.network(race.network, race.dataset, "race.network")
    check_batch(dataset, race.batch_size)
    recipe = config.model_copy(update={"training": race.training})
    setup = setup_of(recipe, network, dataset, race.batch_size)
    rows: list[Row] = []
    first = race.training.seed
    with open_target(stage, config.sweep.device) as target:

        def rows_of(seed: int) -> RunRows:
            return race_rows(race, stage.name, seed, target.name, target.kind)

        def give_up(status: str, reason: str) -> None:
            rows.append(blank(rows_of(first), race, status, reason))

        try:
            with open_engine(stage, setup, target, dataset) as engine:
                note(phase="validate")
                images, labels = dataset.train_images, dataset.train_labels
                start(engine, first)
                check_before(engine, images, labels, first)
                start(engine, first)
                warm_up(recipe, engine, dataset, first)
                note(phase="train")
                recording = Recording(engine)
                for seed in seeds(race):
                    for epoch in trained(recording, dataset, race, seed):
                        rows.append(rows_of(seed).row(**epoch, target_accuracy=race.target))
                check_after(recording, images, labels, first)
            if not race.training.momentum:
                check_momentum(stage, setup, target, dataset, first)
            for row in rows:
                row["validated"] = True
        except (DoesNotFit, MemoryError) as error:
            give_up("does_not_fit", str(error) or "out of memory")
        except Unsupported as error:
            give_up("unavailable", str(error))
        except Unjudged as error:
            rows.clear()
            give_up("unjudged", str(error))
        except Exception as error:
            if not blames_stage(error):
                raise
            if isinstance(error, ValidationFailed):
                print(f"error: {error}", file=sys.stderr)
            else:
                traceback.print_exc()
            rows.clear()  # none of them can be trusted
            give_up("failed", f"{type(error).__name__}: {error}")
    schema.write(out, "race", rows)
    return rows


def blank(rows: RunRows, race: Race, status: str, reason: str) -> Row:
    """A row of `race` without a measurement."""
    return rows.blank("race", status, reason, epoch=1, target_accuracy=race.target)


def require_race(config: Config) -> Race:
    """The config's race; ConfigError where it has none."""
    if config.race is None:
        raise ConfigError("the config has no section race, with the recipe to run")
    return config.race


def trained(recording: Recording, dataset: Dataset, race: Race, seed: int) -> list[Row]:
    """One training from `seed`: a row for each epoch, timed since the training began."""
    engine = recording.engine
    start(engine, seed)
    rows: list[Row] = []
    seconds = 0.0
    count = len(dataset.train_labels)
    for done in recorded_epochs(recording, count, race.training.epochs, seed):
        seconds += done.seconds
        rows.append(
            {
                "status": "diverged" if done.diverged else "ok",
                "epoch": done.epoch,
                "images": done.images,
                "train_seconds": seconds,
                "loss": done.loss,
                "test_accuracy": accuracy(engine, dataset.test_images, dataset.test_labels),
            }
        )
        recording.unchanged("an evaluation")
    return rows
