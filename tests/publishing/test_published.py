"""Published machines are whole, have nothing private in them, and are listed."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from cnnlib.errors import DataError
from cnnlib.measuring import schema
from cnnlib.paths import ROOT
from cnnlib.publishing.contents import Table, thinned
from cnnlib.publishing.published import check, machines
from workflow.glue import modules
from workflow.plotting import recognition, wording
from workflow.plotting.ladder import NAMES_OF_PEERS, own_rows, with_best_library
from workflow.report.machines import BATCH_SIZES
from workflow.report.machines import table as machines_table

REFERENCE = ROOT / "results/reference"


@pytest.mark.parametrize("folder", sorted(REFERENCE.iterdir()), ids=lambda folder: folder.name)
def test_every_published_folder_is_whole(folder: Path) -> None:
    check(folder)


def test_the_table_of_machines_has_the_published_times() -> None:
    table = machines_table(REFERENCE)
    (line,) = (line for line in table.splitlines() if line.startswith("| nvidia-h100 |"))
    assert " NVIDIA H100 80GB HBM3 | Intel Xeon | naive, gemm, gemm_cuda, fused," in line
    summary = pd.read_csv(REFERENCE / "nvidia-h100/tables/summary.csv")
    for size in BATCH_SIZES:
        best = summary[(summary["batch_size"] == size)].nsmallest(1, "epoch_seconds").iloc[0]
        assert f" {wording.duration(best['epoch_seconds'])} ({best['stage']}) |" in line
    runs = (REFERENCE / "nvidia-h100/provenance").glob("*.json")
    facts = [json.loads(path.read_text("utf-8")) for path in runs]
    days = sorted(each["started"][:10] for each in facts)
    dates, commits = line.split(" | ")[-2:]
    assert dates.split(" to ") == list(dict.fromkeys([days[0], days[-1]]))
    assert set(commits.strip(" |").split(", ")) == {each["commit"][:7] for each in facts}
    names = [machine.name for machine in machines(REFERENCE)]
    own = [name for name in names if not name.startswith("nvidia-h100-")]
    assert len(table.splitlines()) == 2 + len(own)


def test_more_results_of_a_machine_are_no_machine_of_their_own(tmp_path: Path) -> None:
    for name in ("gpu", "gpu-networks", "gpu-pcie", "gpux"):
        shutil.copytree(REFERENCE / "nvidia-h100/provenance", tmp_path / name / "provenance")
        rows = schema.read(REFERENCE / "nvidia-h100/tables/epochs.csv", "epochs").head(900)
        device = "another GPU" if name == "gpu-pcie" else "NVIDIA H100 80GB HBM3"
        rows.loc[rows["device_kind"] == "cuda", "device"] = device
        (tmp_path / name / "tables").mkdir()
        schema.write(tmp_path / name / "tables/epochs.csv", "epochs", rows.to_dict("records"))
    lines = machines_table(tmp_path).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| gpu", "| gpu-pcie", "| gpux"]


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("provenance/run.json", None, "has no provenance/run.json"),
        ("provenance/run.json", "{", "is damaged: it is not JSON"),
        ("tables/epochs.csv", None, "has no epochs.csv"),
        ("tables/epochs.csv", "a,b\n", "is not a epochs table"),
        ("tables/epochs.csv", ",true,false\n", "is ok but not validated"),
        ("provenance/run.json", '{"status": "ok", "at": "/data/x/y"}', "holds a path of this"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(
    tmp_path: Path, file: str, text: str | None, named: str
) -> None:
    folder = tmp_path / "machine"
    (folder / "tables").mkdir(parents=True)
    (folder / "provenance").mkdir()
    published = REFERENCE / "nvidia-h100"
    shutil.copy(published / "provenance/run.json", folder / "provenance")
    rows = (published / "tables/epochs.csv").read_text().splitlines(keepends=True)[:9]
    (folder / "tables/epochs.csv").write_text("".join(rows))
    check(folder)
    if text is None:
        (folder / file).unlink()
    elif text.startswith(","):
        damaged = "".join(rows).replace(",true,false\n", ",false,false\n")
        (folder / file).write_text(damaged.replace(",true,true\n", ",false,true\n"))
    else:
        (folder / file).write_text(text)
    with pytest.raises(DataError, match=named):
        check(folder)


def test_memory_is_drawn_alike_from_the_samples_that_are_kept(tmp_path: Path) -> None:
    samples = schema.read(REFERENCE / "nvidia-h100/tables/samples.csv", "samples")
    once = samples[samples["repeat"] == 1]
    # published samples are thinned already: four more repeats are as dense as unpublished ones
    dense = once.loc[once.index.repeat(3)]
    more = [dense.assign(repeat=i, seed=i) for i in range(2, 6)]
    whole = pd.concat([once, *more], ignore_index=True)
    table = thinned(Table("samples", {name: list(whole[name]) for name in whole}))
    kept = pd.DataFrame(table.columns)
    assert len(kept) < len(whole) / 4
    memory = modules.load("figures", "memory")
    drawn = []
    for rows in (whole, kept):
        samples, _ = memory.choose(rows[rows["phase"] != "close"])
        peaks = samples.groupby(memory.RUN, sort=False)["memory"].max().reset_index()
        shown = samples[samples["batch_size"] == memory.common_batch(peaks)]
        first = shown[shown["repeat"] == 1]
        drawn.append((peaks, first[["stage", "phase", "time_seconds", "memory"]].values.tolist()))
        assert len(first) > 1000
    pd.testing.assert_frame_equal(drawn[0][0], drawn[1][0])
    assert drawn[0][1] == drawn[1][1]


def test_figures_see_the_same_of_the_predictions_that_are_kept() -> None:
    folder = REFERENCE / "nvidia-h100/tables"
    epochs = schema.read(folder / "epochs.csv", "epochs")
    kept = schema.read(folder / "predictions.csv", "predictions")
    # published predictions are thinned already: libraries' at other sizes are made of those
    libraries = kept[kept["stage"].isin(NAMES_OF_PEERS)]
    others = [libraries.assign(batch_size=size) for size in (16, 256, 1024)]
    whole = pd.concat([kept, *others]).drop_duplicates(
        ["stage", "batch_size", "images", "image_index"], ignore_index=True
    )
    table = thinned(Table("predictions", {name: list(whole[name]) for name in whole}))
    thin = pd.DataFrame(table.columns)
    assert len(thin) < len(whole)
    parting = modules.load("figures", "parting")
    for seen in (
        lambda rows: recognition.one_run(with_best_library(rows, epochs)),
        lambda rows: recognition.one_run(own_rows(rows)),
        parting.compared,
        lambda rows: rows[rows["batch_size"] == 64],
    ):
        expected = seen(whole).reset_index(drop=True)
        assert len(expected)
        pd.testing.assert_frame_equal(seen(thin).reset_index(drop=True), expected)
