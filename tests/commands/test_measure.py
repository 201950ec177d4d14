"""The command `measure`: what it says of results and of stages that fail."""

import ctypes
import dataclasses
import json
import os
import time
from typing import Any

import pytest

from cnnlib import stages
from cnnlib.measuring import schema
from cnnlib.measuring.freshness import damage
from cnnlib.measuring.runs import Run, settings_digest
from cnnlib.paths import ROOT
from cnnlib.stages import naive
from tests.support.command_line import MEASURE, Home, changed
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


def test_measure_says_when_it_diverges(home: Home) -> None:
    home.write(toy_config(training={"learning_rate": 1e30}))
    assert home(*MEASURE).startswith("gemm, batch 8: diverged, on ")
    assert list(schema.read("run/epochs.csv", "epochs").status) == ["diverged"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["crashes", "leaves", "hangs"])
def test_a_stage_that_ends_its_process(
    home: Home, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Without --mark it is an error; with it the older result is replaced by a `failed` row."""

    def train(self: Any, *arguments: Any) -> float:
        if how == "leaves":
            os._exit(0)
        if how == "hangs":
            time.sleep(600)
        return float(ctypes.string_at(0))

    engine = type("Engine", (naive.STAGE.engine,), {"train": train})
    bad = dataclasses.replace(naive.STAGE, name="bad", engine=engine)
    home.write(toy_config(measuring={"limit_seconds": 6.0} if how == "hangs" else {}))
    home(*MEASURE)
    before = (home.folder / "run/run.json").read_bytes()
    monkeypatch.setattr(stages, "LADDER", (bad,))
    command = changed(MEASURE, "--stage", "bad")
    why = {
        "crashes": "killed by SIGSEGV while validating, in ",
        "leaves": "ended its process with exit code 0 while validating",
        "hangs": "stage 'bad' hangs while validating, "
        "in check_steps of cnnlib/validation/steps.py:",
    }[how]
    said = home(*command, code=1).splitlines()[-1]
    assert said.startswith(f"error: {why}")
    assert (home.folder / "run/run.json").read_bytes() == before
    assert home(*command, "--mark").startswith(f"bad, batch 8: failed: {why}")
    facts = json.loads((home.folder / "run/run.json").read_text())
    assert facts["failed"].startswith(why)
    if how == "hangs":
        assert facts["failed"].endswith("run took longer than measuring.limit_seconds, 6 s")
    (row,) = schema.read(home.folder / "run/epochs.csv", "epochs").itertuples()
    assert (row.stage, row.status, row.validated) == ("bad", "failed", False)
    assert (row.device, row.device_kind) == (facts["device"], "cpu")
    assert facts["device"]
    asked = Run("toy", "small", "bad", 8, 1)
    assert facts["settings"] == settings_digest(home.config, asked, bad.runs_on)
    assert damage(home.folder / "run") == ""
    assert home.names() == ["config.yaml", "run", "toy.npz"]
    assert {path.name for path in (home.folder / "run").iterdir()} == {
        "run.json",
        *(f"{name}.csv" for name in schema.RUN_TABLES),
    }
    profile = ("cpu-profile", *command[1:-1], "f.csv")
    home(*profile)
    (row,) = schema.read(home.folder / "f.csv", "cpu_profile").itertuples()
    assert (row.stage, row.status, row.calls) == ("bad", "failed", 0)


@pytest.mark.slow
def test_a_stage_that_replaces_the_clock(home: Home) -> None:
    cheat = str(ROOT / "tests/wrong/cheats/slows_the_clock.py")
    said = home(*changed(MEASURE, "--stage", cheat), code=2)
    assert "it has replaced time.perf_counter, the clock" in said
    assert not (home.folder / "run").exists()
