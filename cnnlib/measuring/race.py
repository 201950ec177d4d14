"""How soon a stage reaches an accuracy: one recipe, trained from many seeds, on the clock.

The recipe (network, batch size, training) stands in the config's section `race`. It is for whoever
writes it to choose it without the test set; here it is only run. Peers run the same one.
"""

import math
import sys
import traceback
from pathlib import Path
from typing import Any

from cnnlib.config import Config, Race
from cnnlib.datasets import Dataset
from cnnlib.errors import ConfigError, DoesNotFit, Unsupported
from cnnlib.measuring import schema
from cnnlib.measuring.run import is_the_stages, warm_up
from cnnlib.stages import find_stage
from cnnlib.system.supervisor import note
from cnnlib.training.loop import accuracy, start
from cnnlib.training.target import check_batch, open_engine, open_target, setup_of
from cnnlib.validation.parity import Unjudged, ValidationFailed
from cnnlib.validation.replay import Recording, recorded_epochs
from cnnlib.validation.trajectory import check_after, check_before, check_momentum

Row = dict[str, Any]


def seeds(race: Race) -> range:
    """Those of the race's trainings: race.seeds of them, from the recipe's own on."""
    return range(race.training.seed, race.training.seed + race.seeds)


def run_race(config: Config, stage_name: str, dataset: Dataset, out: Path) -> list[Row]:
    """Train race.seeds times by the stage and write the rows of `race` to `out`; the rows.

    The stage is checked before the first of them, and all of them are replayed after the last, as
    in every measurement. An epoch's clock is that of every measurement; evaluating
    the test images is off it. What the stage cannot do here, or does wrong, gives one row that says
    so. Raises ConfigError where the config has no race.
    """
    race = the_race(config)
    stage = find_stage(stage_name, "--stage")
    network = config.network(race.network, race.dataset, "race.network")
    check_batch(dataset, race.batch_size)
    recipe = config.model_copy(update={"training": race.training})
    setup = setup_of(recipe, network, dataset, race.batch_size)
    rows: list[Row] = []
    with open_target(stage, config.sweep.device) as target:
        identity = {
            "dataset": race.dataset, "network": race.network, "stage": stage.name,
            "device": target.name, "batch_size": race.batch_size, "target_accuracy": race.target,
        }  # fmt: skip

        def add(seed: int, status: str = "ok", **values: Any) -> None:
            of_run = {"seed": seed, "repeat": seed - race.training.seed + 1}
            nothing = dict(
                epoch=1, images=0, train_seconds=math.nan, loss=math.nan, test_accuracy=math.nan
            )
            validated = status in ("ok", "diverged")
            standing = {
                "device_kind": target.kind, "status": status, "validated": validated,
                "extrapolated": False,
            }  # fmt: skip
            rows.append(identity | of_run | nothing | values | standing)

        first = race.training.seed
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
                    for row in trained(recording, dataset, race, seed):
                        add(seed, **row)
                check_after(recording, images, labels, first)
            if not race.training.momentum:
                check_momentum(stage, setup, target, dataset, first)
        except (DoesNotFit, MemoryError) as error:
            add(first, "does_not_fit", reason=str(error) or "out of memory")
        except Unsupported as error:
            add(first, "unavailable", reason=str(error))
        except Unjudged as error:
            rows.clear()
            add(first, "unjudged", reason=str(error))
        except Exception as error:
            if not is_the_stages(error):
                raise
            if isinstance(error, ValidationFailed):
                print(f"error: {error}", file=sys.stderr)
            else:
                traceback.print_exc()
            rows.clear()  # what there was is not to be trusted
            add(first, "failed", reason=f"{type(error).__name__}: {error}")
    schema.write(out, "race", rows)
    return rows


def the_race(config: Config) -> Race:
    """The config's race; ConfigError where it has none."""
    if config.race is None:
        raise ConfigError("the config has no section race, with the recipe to run")
    return config.race


def trained(recording: Recording, dataset: Dataset, race: Race, seed: int) -> list[Row]:
    """One training from `seed`: a row an epoch, its time that since the training began."""
    engine = recording.engine
    start(engine, seed)
    rows, seconds = [], 0.0
    count = len(dataset.train_labels)
    for done in recorded_epochs(recording, count, race.training.epochs, seed):
        seconds += done.seconds
        row = {
            "status": "diverged" if done.diverged else "ok",
            "epoch": done.epoch,
            "images": done.images,
            "train_seconds": seconds,
            "loss": done.loss,
            "test_accuracy": accuracy(engine, dataset.test_images, dataset.test_labels),
        }
        recording.unchanged("an evaluation")
        rows.append(row)
    return rows
