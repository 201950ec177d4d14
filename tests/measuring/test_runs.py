"""The runs of a sweep: their order, folders and seeds."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from cnnlib.errors import ConfigError
from cnnlib.measuring.runs import (
    check_experiment,
    digest,
    load_experiment,
    parse_experiment,
    run_settings,
    runs,
    seed_of,
)
from cnnlib.paths import ROOT
from tests.test_config import GOOD, changed

pytestmark = pytest.mark.quick


def with_sweep(**sweep: Any) -> dict[str, Any]:
    config = copy.deepcopy(GOOD)
    config["sweep"] |= sweep
    return config


def test_repeats_are_outermost() -> None:
    """Repeats are outermost, so that a machine that slowly warms up treats all stages alike."""
    config = parse_experiment(with_sweep(stages=["naive", "gemm"], batch_sizes=[1, 4], repeats=2))
    assert [(run.repeat, run.batch_size, run.stage) for run in runs(config)] == [
        (repeat, batch_size, stage)
        for repeat in (1, 2)
        for batch_size in (1, 4)
        for stage in ("naive", "gemm")
    ]


def test_every_run_has_a_folder_of_its_own() -> None:
    config = parse_experiment(with_sweep(stages=["naive", "gemm"], batch_sizes=[1, 4], repeats=3))
    folders = [run.folder for run in runs(config)]
    assert len(set(folders)) == len(folders) == 12
    assert folders[0] == Path("runs/toy/small/naive/b1/r1")


def test_all_stages_of_a_repeat_start_alike() -> None:
    config = parse_experiment(changed("training.seed", 7))
    assert [seed_of(config, repeat) for repeat in (1, 2, 3)] == [7, 8, 9]


def test_an_unknown_stage_is_named_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"unknown stage 'gem' in sweep\.stages; known: naive, "):
        parse_experiment(with_sweep(stages=["gem"]))


def test_settings_that_came_later_leave_old_digests_as_they_were() -> None:
    """Results of earlier versions are still recognised, where new settings have their defaults."""
    config = parse_experiment(GOOD)
    for runs_on in ("cpu", "cuda"):
        found = run_settings(config, "toy", "small", runs_on)
        assert found["network"][0] == {"conv": {"maps": 2, "kernel": 3, "stride": 1}}
        assert found["network"][2] == {"subsample": {"size": 2, "method": "max"}}
        assert not {"loss", "weight_decay", "initial_weights"} & found["training"].keys()
    changed = GOOD | {"training": GOOD["training"] | {"weight_decay": 0.1}}
    assert run_settings(parse_experiment(changed), "toy", "small", "cpu")["training"][
        "weight_decay"
    ] == pytest.approx(0.1)


def test_the_shipped_configs_can_be_run() -> None:
    experiments = sorted(Path(ROOT, "workflow/experiments").glob("*.yaml"))
    for path in ("config.yaml", "tests/tiny.yaml", *experiments):
        paths = ["config.yaml", path]
        config = load_experiment([ROOT / path for path in paths])
        assert check_experiment(config) is config
        assert runs(config)


def test_the_digest_tells_settings_apart(tmp_path: Path) -> None:
    config = parse_experiment(GOOD)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert digest(load_experiment([path])) == digest(config)
    others = [
        changed("training.learning_rate", 0.2),
        changed("training.seed", 2),
        changed("networks.small.0.conv.maps", 3),
    ]
    assert len({digest(parse_experiment(other)) for other in [GOOD, *others]}) == 4
