"""What each technique gains: the stages that are paired, the table and the figure."""

import dataclasses
import re
import subprocess
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from cnnlib.device import cuda
from cnnlib.device.architecture import H100
from cnnlib.engine import Setup, Stage, options_of
from cnnlib.engine.device_engine import DeviceEngine
from cnnlib.measuring import schema
from cnnlib.paths import KERNELS, ROOT
from cnnlib.stages._own import load_path
from tests.support.networks import awkward
from tests.workflow.rows import epoch_rows
from workflow.glue import modules
from workflow.glue.experiment import Experiment
from workflow.glue.overrides import laid_over
from workflow.plotting import draw

pytestmark = pytest.mark.quick

EXPERIMENT = ROOT / "workflow/experiments/ablation.yaml"
TABLE = modules.load("tables", "ablation")
COPIES = """
ENTRY_POINT(probe, copies)(const float* source, unsigned long long* arrived) {
  SHARED(float, target, 64);
  BulkCopyBarrier barrier{arrived, 0, true};
  copy_bulk(target, source, 64, barrier);
  wait_for_bulk_copies(barrier);
}
"""
GPU = {"device": "an H100", "device_kind": "cuda"}


def records() -> dict[str, Stage]:
    """The stages of the experiment by name."""
    entries = yaml.safe_load(EXPERIMENT.read_text())["sweep"]["stages"]
    stages = [load_path(str(ROOT / entry), "sweep.stages").stage for entry in entries]
    return {stage.name: stage for stage in stages}


def differences(one: Stage, other: Stage) -> set[str]:
    """The options, or else the engine, by which two records differ."""
    if one.engine is not other.engine:
        return {"engine"}
    kind = one.engine.options_class
    pair = [dataclasses.asdict(options_of(stage, kind)) for stage in (one, other)]
    return {name for name in pair[0] if pair[0][name] != pair[1].get(name)}


def test_every_technique_is_two_stages_that_differ_in_it_alone() -> None:
    stages = records()
    assert set(stages) == set(TABLE.STAGES)
    assert set(modules.constant("figures", "ablation", "STAGES")) <= set(stages)
    used = set()
    for technique in TABLE.TECHNIQUES:
        without, by = stages[technique.without], stages[technique.by]
        used |= {without.name, by.name}
        assert len(differences(without, by)) == 1, technique
        assert without.title != by.title
    assert used == set(stages)


@pytest.mark.parametrize("name", TABLE.STAGES)
def test_their_sources_differ_as_they_say(name: str) -> None:
    stage = records()[name]
    assert issubclass(stage.engine, DeviceEngine)
    source = stage.engine.source_on(stage, Setup(awkward(), 16, 0.1), H100.limits)
    assert ("NO_BULK_COPIES" in source) == (name == "persistent_without_bulk_copies")
    programmatic = name.startswith("graph") and name not in {"graph_launches", "graph_captured"}
    assert ("PROGRAMMATIC_LAUNCH" in source) == programmatic


@pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc on PATH")
def test_without_bulk_copies_there_are_none_in_the_code(tmp_path: Path) -> None:
    file, command = tmp_path / "k.cu", [str(cuda.find_nvcc()), "-ptx", "-arch=sm_90", "-std=c++17"]
    for head in ("", "#define NO_BULK_COPIES\n"):
        file.write_text(f'{head}#include "async.cuh"\n{COPIES}')
        command = [*command[:4], "-I", str(KERNELS), "-o", "k.ptx", file.name]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=100)
        assert ("cp.async.bulk" in (tmp_path / "k.ptx").read_text()) == (not head)


def rows(times: dict[str, float], **changes: object) -> list[dict]:
    """Two repeats of two epochs of each stage, at each of two batch sizes."""
    return [
        row
        for size in (16, 1024)
        for stage, seconds in times.items()
        for row in epoch_rows(
            stage,
            [[seconds, seconds * 1.02], [seconds * 0.99, seconds * 1.01]],
            **(GPU | {"batch_size": size} | changes),
        )
    ]


def made(*parts: list[dict]) -> pd.DataFrame:
    frame = pd.DataFrame(chain(*parts), columns=list(schema.TABLES["epochs"]))
    return TABLE.make({"epochs": frame})


TIMES = {
    "graph_launches": 0.4,
    "graph_captured": 0.2,
    "graph_programmatic": 0.16,
    "graph_gathered_by_host": 0.2,
    "graph_ffma": 0.48,
    "graph_tf32": 0.24,
    "persistent": 0.08,
    "persistent_one_team": 0.072,
}


def test_gains_are_ratios_of_medians() -> None:
    table = made(rows(TIMES))
    assert list(table.columns) == list(TABLE.COLUMNS)
    gains = table.set_index(["technique", "batch_size"])["gain"]
    assert gains["many steps in one CUDA graph", 16] == pytest.approx(2)
    assert gains["one launch instead of a graph", 1024] == pytest.approx(2.5)
    assert gains["two teams of threads a block", 16] == pytest.approx(0.9)
    low, high = table["gain_low"], table["gain_high"]
    valid = table["gain"].notna()
    assert (low[valid] <= table["gain"][valid]).all()
    assert (table["gain"][valid] <= high[valid]).all()
    # One of the two stages was not measured.
    assert np.isnan(gains["bulk copies of weights", 16])
    assert np.isnan(gains["FP16 planes instead of BF16", 16])
    text = TABLE.markdown(table)
    assert re.search(r"^\| one launch instead of a graph \| 2\.50× \| 2\.50× \|$", text, re.M)
    assert re.search(r"^\| bulk copies of weights \| - \| - \|$", text, re.M)


@pytest.mark.parametrize("change", [{"validated": False}, {"status": "disturbed"}])
def test_times_that_do_not_count_make_no_gain(change: dict[str, object]) -> None:
    good = rows({k: v for k, v in TIMES.items() if k != "persistent"})
    table = made(good, rows({"persistent": 0.01}, **change))
    gains = table.set_index("technique")["gain"]
    assert gains["one launch instead of a graph"].isna().all()
    assert gains["many steps in one CUDA graph"].notna().all()


def drawn(table: pd.DataFrame, epochs: list[dict]) -> str:
    frame = pd.DataFrame(epochs, columns=list(schema.TABLES["epochs"])).assign(reason="")
    return str(draw.draw("ablation", {"ablation": table, "epochs": frame}))


def test_the_figure_names_the_largest_gain() -> None:
    said = drawn(made(rows(TIMES)), rows(TIMES))
    assert "The largest gain is 2.50×: " in said
    assert "95 % bootstrap intervals" in said
    costly = rows({"persistent": 0.2, "persistent_one_team": 0.1})
    assert "No technique gains time" in drawn(made(costly), costly)
    emulated = rows(TIMES, device_kind="emulated", device="a CPU")
    assert "The largest gain" not in drawn(made(emulated), emulated)
    nothing = rows({"persistent": 0.2})
    assert "was not measured" in drawn(made(nothing), nothing)


def test_only_an_experiment_with_such_stages_has_the_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    usual = yaml.safe_load((ROOT / "config.yaml").read_text()) | {"results": str(tmp_path)}
    found = Experiment(usual)
    assert "ablation" not in found.wanted_figures + found.wanted_tables
    given = laid_over(usual, yaml.safe_load(EXPERIMENT.read_text()))
    found = Experiment(given | {"results": str(tmp_path)})
    assert found.wanted_figures == ["ablation", "latency", "profile"]
    assert "ablation" in found.wanted_tables


def test_the_report_of_published_results_takes_it_from_the_folder_beside_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    machine = tmp_path / "machine"
    (machine / "tables").mkdir(parents=True)
    frame = pd.DataFrame(rows({"persistent_one_team": 0.2}), columns=list(schema.TABLES["epochs"]))
    schema.write(
        machine / "tables/epochs.csv", "epochs", frame.assign(reason="").to_dict("records")
    )
    for name in ("ablation", "speedup"):
        path = tmp_path / f"machine-ablation/figures/{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    usual = yaml.safe_load((ROOT / "config.yaml").read_text()) | {"results": str(machine)}
    found = Experiment(usual)
    # its own stages are those of its rows: the table that they need can be made
    assert found.wanted_tables == ["ablation"]
    beside = str(tmp_path / "machine-ablation/figures/ablation.svg")
    assert "ablation" not in found.wanted_figures
    assert found.page_figures[-1] == beside
    assert not any("speedup" in path for path in found.page_figures)
    assert Experiment(usual | {"results": str(tmp_path)}).page_figures[-1] != beside
