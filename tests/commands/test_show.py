"""Commands that only show something."""

import json
import re
from typing import Any

import pytest
import yaml

from cnnlib import stages
from cnnlib.device.emulated import EmulatedDevice
from cnnlib.engine import Setup
from tests.support.command_line import Home
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


def test_ladder(home: Home) -> None:
    assert "no results/tables/ladder.md yet: `make run` makes it" in home.fails("ladder")
    (home.folder / "here/tables").mkdir(parents=True)
    (home.folder / "here/tables/ladder.md").write_text("| stage |\n|---|\n| naïve × 3 |\n")
    assert home("ladder", "--results", "here") == "| stage |\n|---|\n| naïve × 3 |\n"


def test_stages_and_plan(home: Home) -> None:
    said = home("stages")
    for stage in stages.LADDER:
        assert re.search(rf"^{stage.name}  .*{re.escape(stage.change)}$", said, re.M)
    said = home("plan")
    assert re.search(r"^conv1 +2x6x6 +20 +1,296$", said, re.M)
    assert said.count("\nstage ") == len(stages.LADDER)
    assert said.startswith("GPU ")
    said = home("plan", "--stage", "naive", "--network", "small", "--dataset", "toy")
    assert said.startswith("network small")
    assert said.count("\nstage ") == 1
    assert re.search(r"^  Loops +dense1$", said, re.M)
    plan = home("plan", "--stage", "tuned")
    assert re.search(r"^    TunedBytePlaneConv +conv1\+activation1\+subsample1$", plan, re.M)
    assert "unknown stage 'x' in --stage" in home.fails("plan", "--stage", "x")
    assert "unknown network 'x' in --network" in home.fails("plan", "--network", "x")


@pytest.mark.parametrize("name", [stage.name for stage in stages.ALL if stage.runs_on == "cuda"])
def test_source_needs_neither_gpu_nor_compiler(
    home: Home, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    said = home("show-source", "--stage", name, "--network", "small", "--batch-size", "7")
    assert "struct conv1 {" in said
    assert "struct dense1 {" in said
    assert len(said.splitlines()) < 120
    assert home("show-source", "--stage", name, "--batch-size", "7", "--gpu", "H100") == said


def test_source_that_there_is_not(home: Home) -> None:
    assert "stage 'naive' has no generated source" in home.fails("show-source", "--stage", "naive")
    assert "unknown GPU 'x' in --gpu; known: t4, a100, rtx4090, h100, b200" in home.fails(
        "show-source", "--gpu", "x"
    )
    assert "--batch-size must be at least 1" in home.fails("show-source", "--batch-size", "0")
    assert "unknown network 'x' in --network" in home.fails("show-source", "--network", "x")


class NoKernels(EmulatedDevice):
    """A device for engines that are made without compiling anything."""

    def compile(self, *source: Any) -> Any:
        return None


@pytest.mark.parametrize("device", ["emulated", "cuda"])
def test_plan_says_what_run_json_would_say(
    home: Home, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """This holds for every stage, and without a GPU neither a compiler nor a kernel is needed."""
    convolution = {"conv": {"maps": 64, "kernel": 3}}
    fits = [{"conv": {"maps": 2, "kernel": 3}}, {"activation": "relu"}, {"subsample": 2}]
    networks: dict[str, Any] = {
        "fits": [*fits, {"dense": 3}],
        "wide": [convolution, {"activation": "relu"}, convolution, {"dense": 3}],
        "strided": [{"conv": {"maps": 2, "kernel": 3, "stride": 2}}, {"dense": 3}],
    }
    names = [stage.name for stage in (*stages.LADDER, *stages.VARIANTS)]
    sweep = {"networks": list(networks), "stages": names, "device": device}
    home.write(toy_config(networks=networks, sweep=sweep))
    given = [option for name in names for option in ("--stage", name)]
    with monkeypatch.context() as without:
        without.setenv("CXX", "/nowhere/g++")
        without.setattr("cnnlib.device.cuda.missing_parts", lambda: ["no driver"])
        printed = json.loads(home("plan", *given, "--json"))
    said = {
        each["network"]: {facts["stage"]: facts for facts in each["stages"]}
        for each in printed["networks"]
    }
    # Of the plans of stage tuned, persistent declines the gradient of 36,928 weights.
    assert said["wide"]["tuned"]["operators"][0]["operator"] == "GraphConv"
    assert said["fits"]["tuned"]["operators"][0]["operator"] == "TunedBytePlaneConv"
    assert printed["gpu"]["limits"].startswith("by its record, as there is no GPU to use here")
    with NoKernels() as emulated:
        for name in networks:
            network = home.config.network(name, "toy", "here")
            for stage in (*stages.LADDER, *stages.VARIANTS):
                place = emulated if stage.runs_on == "cuda" else None
                with stage.engine(stage, Setup(network, 8, 0.1), place) as engine:
                    operators = said[name][stage.name]["operators"]
                    pairs = [f"{each['layers']}: {each['operator']}" for each in operators]
                    assert engine.served == pairs, stage.name


def test_a_network_is_shown_for_the_images_that_it_is_made_for(home: Home) -> None:
    more = {
        "datasets": {
            "wide": {
                "kind": "synthetic",
                "shape": [3, 9, 9],
                "classes": 3,
                "train_images": 64,
                "test_images": 16,
            }
        },
        "networks": {"colour": {"input_shape": [3, 9, 9], "layers": [{"dense": 3}]}},
    }
    (home.folder / "more.yaml").write_text(yaml.safe_dump(more))
    files = ("--config", "config.yaml", "--config", "more.yaml")
    chosen = (*files, "--stage", "gemm", "--network", "colour")
    assert home("plan", *chosen).startswith("network colour, source 3x9x9\n")
    assert home("plan", *chosen, "--dataset", "toy").startswith("network colour, source 1x8x8\n")
    assert home("plan", *files, "--stage", "gemm").startswith("network small, source 1x8x8\n")
