"""No number contradicts another: titles, tables, README and poster say what the raw rows say."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot

from cnnlib.measuring import schema
from cnnlib.paths import ROOT
from cnnlib.peers import PEERS
from tests.workflow.rows import epoch_rows, ladder, line, summarise
from workflow.figures import latency, memory_latency, profile, race, speedup
from workflow.glue import modules
from workflow.plotting import accuracies, layout, panels, recognition, wording
from workflow.report import poster

REFERENCE = ROOT / "results/reference/nvidia-h100"
NAMES = ("summary", "ladder", "epochs", "kernels", "race_summary")


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    paths = [REFERENCE / f"tables/{name}.csv" for name in NAMES]
    return modules.read_tables(paths)


def median(epochs: pd.DataFrame, stage: str, size: int) -> float:
    """From the raw rows, without the code that makes tables."""
    own = epochs[(epochs["stage"] == stage) & (epochs["batch_size"] == size)]
    return float(np.median(own.loc[own["status"] == "ok", "epoch_seconds"]))


def test_they_say_the_same_of_an_epoch(tables: dict[str, pd.DataFrame]) -> None:
    epochs = tables["epochs"]
    own, before = median(epochs, "tuned", 64), median(epochs, "ring", 64)
    exact = [peer.name for peer in PEERS if peer.rounding is None]
    library = min(median(epochs, peer, 64) for peer in exact)
    time, gain = wording.duration(own), wording.times(before / own)
    ratio = wording.times(library / own)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = next(row for row in readme.splitlines() if row.startswith("| 5 tuned |"))
    page = (REFERENCE / "tables/ladder.md").read_text(encoding="utf-8")
    cells = next(row for row in page.splitlines() if row.startswith("| 5 tuned |"))
    for said in (speedup.title(tables["ladder"]), poster.result(tables["ladder"]), cells):
        assert time in said
        assert gain in said
        assert ratio in said
    assert f"| {time} | {gain} |" in row
    # a step is an epoch over its steps, in every figure
    step = wording.duration(own / (60_000 // 64))
    kernels = tables["kernels"]
    kernels = kernels[(kernels["status"] == "ok") & (kernels["launches"] > 0)]
    parts = profile.of_parts(kernels).join(profile.step_seconds(epochs), on=profile.CELL)
    assert f"takes {step}," in profile.title(parts)
    steps = latency.with_steps(tables["summary"], epochs)
    found = steps[(steps["stage"] == "tuned") & (steps["batch_size"] == 64)].iloc[0]
    assert wording.duration(found["epoch_step"]) == step
    # and a training is its images times the time per image
    paces = recognition.paces(epochs[epochs["batch_size"] == 64])
    (pace,) = set(paces.loc[paces["stage"] == "tuned", "pace"])
    assert pace * (60_000 // 64 * 64) == pytest.approx(own)


def test_numbers_beside_lines_are_those_of_the_readme(tables: dict[str, pd.DataFrame]) -> None:
    """They are of the largest batch that learns, as the README's last columns are."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\*", "").splitlines()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in readme if "|" in row]
    cells = {row[0]: row for row in rows if row[0][:2] in {f"{n} " for n in range(1, 6)}}
    assert len(cells) == 6
    heads = next(row for row in rows if row[0] == "stage")
    assert heads[4].startswith("epoch, batch 256 ")
    beside = {}
    for figure in (latency, speedup):
        drawn = figure.draw({name: tables[name] for name in figure.TABLES}, layout.Sheet()).figure
        axes = drawn.axes[1]
        said = [text.get_text().rsplit("  ", 1) for text in axes.texts]
        assert ["at batch 256"] in said
        beside[figure] = dict(pair for pair in said if len(pair) == 2)
        pyplot.close(drawn)
    assert {name: cells[name][4] for name in cells} == {
        name: value for name, value in beside[latency].items() if name in cells
    }
    compared = {name: value for name, value in beside[speedup].items() if name in cells}
    assert compared == {name: cells[name][6] for name in compared}
    assert "5 tuned" in compared


def test_latencies_of_a_title_are_in_its_panel() -> None:
    (probes,) = modules.read_tables([REFERENCE / "tables/probes.csv"]).values()
    drawn = memory_latency.draw({"probes": probes}, layout.Sheet())
    written = " ".join(text.get_text() for text in drawn.figure.axes[0].texts)
    pyplot.close(drawn.figure)
    for time in re.findall(r"[\d.]+ ns", drawn.headline.title):
        assert f" {time}" in f" {written}"


def test_titles_are_of_batches_that_learn(tables: dict[str, pd.DataFrame]) -> None:
    learned = {size for (*_, size), fine in accuracies.learned(tables["summary"]).items() if fine}
    assert learned == {16, 32, 64, 128, 256}
    title = latency.title(latency.with_steps(tables["summary"], tables["epochs"]))
    assert "at batch 256" in title
    rungs = tables["ladder"]
    assert set(rungs.loc[rungs["learns"], "batch_size"]) == learned
    page = (REFERENCE / "tables/ladder.md").read_text(encoding="utf-8")
    accuracy = 100 * rungs.loc[rungs["batch_size"] == 1024, "batch_accuracy"].iloc[0]
    assert f"batch 1024** (learns too little in 2 epochs: {accuracy:.1f} %)" in page
    assert "batch 64**\n" in page
    ring = next(row for row in page.splitlines() if row.startswith("| 4 ring |"))
    own = rungs[(rungs["stage"] == "ring") & (rungs["batch_size"] == 64)].iloc[0]
    assert ("; no gain |" in ring) == (own["gain_low"] <= 1 <= own["gain_high"])
    assert "not on LeNet-5's" in ring


def test_the_race_is_the_same_in_its_title_and_the_readme(tables: dict[str, pd.DataFrame]) -> None:
    title = race.title(tables["race_summary"])
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    own, other = (part.split()[0] for part in title.split("after ")[1:])
    raced = any(tables["race_summary"]["stage"].str.endswith("_tf32"))
    library = "the fastest library" + " in float32" * (not raced)
    assert f"stage 5 trains for {own} ms and {library} for {other} ms" in readme


def test_an_image_at_a_time_takes_as_long_at_every_batch_size() -> None:
    """Its runs are pooled by the time per image, over all batch sizes."""
    scaled = {"extrapolated": True, "images": 4}
    full = epoch_rows("gemm", [[1.0]]) + epoch_rows("gemm", [[1.0]], batch_size=48, images=48)
    naive = epoch_rows("naive", [[64.0], [128.0]], **scaled)
    other = epoch_rows("naive", [[96.0], [144.0]], batch_size=48, **scaled)
    summary = summarise(full, naive, other)
    own = summary[summary["stage"] == "naive"].set_index("batch_size")
    # 1, 2, 2 and 3 seconds an image
    assert own["epoch_seconds"].to_dict() == {8: 128.0, 48: 96.0}
    assert (own["epoch_seconds_low"] / own["epoch_seconds"]).nunique() == 1
    gemm = summary[summary["stage"] == "gemm"].set_index("batch_size")
    assert gemm["speedup"].to_dict() == {8: 128.0, 48: 96.0}


def test_gains_are_over_the_stage_before_and_the_best_library() -> None:
    rungs = ladder(
        epoch_rows("gemm", [[6.0], [6.6]]),
        epoch_rows("fused", [[2.0], [2.0]]),
        epoch_rows("torch", [[5.0], [5.0]]),
        epoch_rows("jax", [[4.0], [4.0]]),
        epoch_rows("jax_tf32", [[1.0], [1.0]]),
    )
    fused, gemm, jax = (line(rungs, stage) for stage in ("fused", "gemm", "jax"))
    assert (fused["before"], fused["gain"]) == ("gemm", pytest.approx(3.15))
    assert (fused["gain_low"], fused["gain_high"]) == pytest.approx((3.0, 3.3))
    assert (fused["library"], fused["library_ratio"]) == ("jax", 2.0)
    assert (gemm["before"], jax["before"], jax["library_ratio"]) == ("", "", 1.0)
    assert math.isnan(gemm["gain"])
    assert math.isnan(fused["share"])


def test_a_batch_that_learns_too_little_is_known() -> None:
    rows = [
        *epoch_rows("gemm", [[1.0]], test_accuracy=0.95),
        *epoch_rows("gemm", [[0.5]], test_accuracy=0.941, batch_size=16),
        *epoch_rows("gemm", [[0.2]], test_accuracy=0.93, batch_size=32),
        *epoch_rows("gemm", [[0.1]], test_accuracy=math.nan, batch_size=64),
    ]
    summary = summarise(rows)
    learned = {size: fine for (*_, size), fine in accuracies.learned(summary).items()}
    # one that was not trained in full is not known to learn too little
    assert learned == {8: True, 16: True, 32: False, 64: True}
    raw = pd.DataFrame(rows, columns=list(schema.TABLES["epochs"]))
    assert accuracies.by_batch(accuracies.of_epochs(raw)) == accuracies.by_batch(summary)


def test_names_are_as_people_say_them_and_devices_are_said_once() -> None:
    assert wording.said("torch_compile_tf32") == "PyTorch (compiled, TF32)"
    assert wording.said("gemm_cuda") == "gemm_cuda"
    rows = epoch_rows("naive", [[1.0]], device="a cpu, 1 thread")
    for stage in ("fused", "ring", "tuned", "jax"):
        rows += epoch_rows(stage, [[1.0]], device="a card", device_kind="cuda")
    assert panels.devices(summarise(rows)) == "naive on a cpu, 1 thread; all others on a card"
