"""The whole workflow on the tiny experiment: what it makes, makes again and leaves as it is."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cnnlib.measuring import schema
from cnnlib.measuring.schema import RUN_TABLES
from tests.workflow.conftest import Checkout, digest, environment, jobs, usual
from workflow.glue import modules

pytestmark = pytest.mark.slow

NOTHING: dict[str, int] = {}
NAMES = usual("figures")
# Tables that do not depend on any run or CPU stage.
BESIDES = {"probes", "pictures", "transfers"}


def concerned(folder: str) -> int:
    """The number of figures or tables that depend on a CPU stage."""
    names = usual(folder)
    return len([n for n in names if not BESIDES.issuperset(modules.tables_read(folder, n))])


TABLES = {"combine": len(RUN_TABLES) + 2, "tabulate": concerned("tables")}
FIGURES = {"draw": concerned("figures"), "page": 1, "all": 1}


def sweep(checkout: Checkout) -> dict:
    return yaml.safe_load((checkout.folder / "results/config.yaml").read_text())["sweep"]


def runs(checkout: Checkout) -> list[dict]:
    """run.json of every run, in the order in which they ended."""
    files = sorted(checkout.folder.glob("results/runs/**/run.json"), key=os.path.getmtime)
    return [json.loads(path.read_text())["run"] for path in files]


def test_all_makes_tables_and_figures(finished: Checkout, printed: str) -> None:
    results, asked = finished.folder / "results", sweep(finished)
    cells = len(asked["stages"]) * len(asked["batch_sizes"])
    assert len(runs(finished)) == cells * asked["repeats"]
    summary = pd.read_csv(results / "tables/summary.csv")
    assert len(summary) == cells
    assert (summary["status"] == "ok").all()
    assert summary["validated"].all()
    assert (summary["repeats"] == asked["repeats"]).all()
    assert (summary["epoch_seconds"] > 0).all()
    ladder = (results / "tables/ladder.md").read_text()
    assert all(stage in ladder for stage in asked["stages"])
    race = pd.read_csv(results / "tables/race_summary.csv")
    assert list(race["stage"]) == ["naive", "gemm"]
    assert (race["n"] == 3).all()
    assert "naive" in (results / "tables/race_summary.md").read_text()
    for name in NAMES:
        assert (results / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (results / f"figures/{name}.svg").read_text()[:1000]
        assert f"results/figures/{name}.png" in printed


def test_a_second_run_does_nothing(finished: Checkout) -> None:
    assert "Nothing to be done" in finished.snakemake("all")


def test_repeats_are_interleaved_across_stages(finished: Checkout) -> None:
    asked = sweep(finished)
    wanted = [
        (repeat, batch_size, stage)
        for repeat in range(1, asked["repeats"] + 1)
        for batch_size in asked["batch_sizes"]
        for stage in asked["stages"]
    ]
    order = [(run["repeat"], run["batch_size"], run["stage"]) for run in runs(finished)]
    assert order == wanted


@pytest.mark.slow(20)
def test_editing_a_figure_draws_only_that_one(mine: Checkout) -> None:
    figures = mine.folder / "results/figures"
    before = {path.name: path.stat().st_mtime_ns for path in figures.iterdir()}
    content = {path.name: digest(path) for path in figures.iterdir()}
    mine.edit("workflow/figures/speedup.py")
    assert mine.planned("all") == {"draw": 1, "page": 1, "all": 1}
    mine.snakemake("all")
    drawn = {
        path.name for path in figures.iterdir() if path.stat().st_mtime_ns != before[path.name]
    }
    assert drawn == {"speedup.png", "speedup.svg"}
    # the same data give the same bytes
    assert {path.name: digest(path) for path in figures.iterdir()} == content


@pytest.mark.slow(30)
def test_a_figure_that_fails_leaves_the_old_one_and_is_drawn_again(mine: Checkout) -> None:
    files = [mine.folder / f"results/figures/speedup.{kind}" for kind in ("png", "svg")]
    before = [(digest(file), file.stat().st_mtime_ns) for file in files]
    figure = mine.folder / "workflow/figures/speedup.py"
    good = figure.read_text()
    figure.write_text(good + 'raise RuntimeError("no figure today")\n')
    assert "no figure today" in mine.snakemake("all", code=1)
    assert [(digest(file), file.stat().st_mtime_ns) for file in files] == before
    # It does not count as drawn, with and without the mistake.
    assert mine.planned("all")["draw"] == 1
    figure.write_text(good + "# another try\n")
    mine.snakemake("all")
    assert [digest(file) for file in files] == [content for content, _ in before]
    assert files[0].stat().st_mtime_ns > before[0][1]
    assert mine.planned("all") == NOTHING


def test_a_table_that_fails_leaves_the_old_one_and_is_made_again(mine: Checkout) -> None:
    tables = mine.folder / "results/tables"
    before = {path: digest(path) for path in tables.glob("ladder.*")}
    assert len(before) == 2
    mine.edit("workflow/tables/ladder.py")
    with open(mine.folder / "workflow/tables/ladder.py", "a", encoding="utf-8") as out:
        out.write('raise RuntimeError("no table today")\n')
    mine.snakemake("all", code=1)
    assert {path: digest(path) for path in tables.glob("ladder.*")} == before
    assert mine.planned("all")["tabulate"] == 1


def test_an_input_of_the_future_is_no_reason_to_run_again_and_again(mine: Checkout) -> None:
    """Snakemake alone fails such a job after its work, and every call runs it again."""
    mine.edit("workflow/figures/speedup.py")
    future = time.time() + 400 * 86400
    for name in ("workflow/figures/speedup.py", "results/data/blobs.npz"):
        os.utime(mine.folder / name, (future, future))
    text = mine.snakemake("all")
    assert "dated in the future, now dated today: 2 files (results/data/blobs.npz, " in text
    assert "measure" not in text.partition("Job stats")[2].partition("total")[0]
    assert mine.planned("all") == NOTHING


def test_editing_a_stage_measures_only_that_stage(mine: Checkout) -> None:
    asked = sweep(mine)
    per_stage = len(asked["batch_sizes"]) * asked["repeats"]
    mine.edit("cnnlib/stages/gemm/conv.py")
    # the CPU profile of gemm, the features that it learned, and its race
    examined = {"cpu_profile": 1, "features": 1, "race": 1}
    plan = mine.snakemake("--dry-run", "all")
    assert jobs(plan) == {
        "sources": 1,
        "measure": per_stage,
        **examined,
        **TABLES,
        **FIGURES,
    }
    assert "stage=gemm," in plan
    assert "stage=naive," not in plan


def test_touching_a_file_is_not_editing_it(mine: Checkout) -> None:
    for name in ("cnnlib/stages/gemm/__init__.py", "workflow/figures/latency.py"):
        (mine.folder / name).touch()
    assert mine.planned("all") == NOTHING


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        (
            {
                "figures": ["speedup"],
                "sweep": {"device": "emulated"},
                "measuring": {"resident_images": 32},
                "networks": {"unused": [{"dense": 3}]},
            },
            0,
        ),
        ({"sweep": {"repeats": 3, "batch_sizes": [4, 8]}}, 4),
        ({"sweep": {"batch_sizes": [4, 8, 16]}}, 4),
        ({"training": {"learning_rate": 0.05}}, 8),
        ({"race": {"seeds": 4}}, 0),
    ],
    ids=["what runs do not depend on", "repeats", "batch sizes", "training", "the race"],
)
def test_a_setting_measures_only_the_runs_it_matters_to(
    mine: Checkout, change: dict, measured: int
) -> None:
    overlay = yaml.safe_load((mine.folder / "tests/tiny.yaml").read_text())
    for key, value in change.items():
        overlay[key] = {**overlay.get(key, {}), **value} if isinstance(value, dict) else value
    (mine.folder / "changed.yaml").write_text(yaml.safe_dump(overlay))
    assert mine.planned("all", config="changed.yaml").get("measure", 0) == measured


def test_the_race_runs_again_for_its_own_settings_only(mine: Checkout) -> None:
    overlay = yaml.safe_load((mine.folder / "tests/tiny.yaml").read_text())
    changed = mine.folder / "changed.yaml"
    overlay["race"]["seeds"] = 4
    changed.write_text(yaml.safe_dump(overlay))
    planned = mine.planned("all", config="changed.yaml")
    assert planned == {"race": 2, "combine": 1, "tabulate": 1, "draw": 1, "page": 1, "all": 1}
    del overlay["race"]
    changed.write_text(yaml.safe_dump(overlay))
    assert not set(mine.planned("all", config="changed.yaml")) & {"race", "combine", "draw"}


@pytest.mark.slow(20)
def test_figures_are_drawn_again_from_tables_alone(
    fresh: Checkout, finished: Checkout, tmp_path: Path
) -> None:
    """Published results have tables and no runs; config.yaml is about other things.

    Two are drawn: test_reference.py draws all, from tables of another machine.
    """
    checkout = fresh.copy(tmp_path / "checkout")
    published = checkout.folder / "results/reference/machine"
    (published / "tables").mkdir(parents=True)
    for name in schema.TABLES.keys() - {"timeline"}:  # which no rule makes
        table = (finished.folder / f"results/tables/{name}.csv").read_bytes()
        (published / f"tables/{name}.csv").write_bytes(table)
    arguments = ("figures", "--config", "results=results/reference/machine")
    planned = checkout.planned(*arguments, config=None)
    assert planned == {"tabulate": 3, "draw": len(NAMES), "figures": 1}
    checkout.snakemake(*arguments, "figures=[race, speedup]", config=None)
    drawn = {path.name: digest(path) for path in (published / "figures").iterdir()}
    assert sorted(drawn) == ["race.png", "race.svg", "speedup.png", "speedup.svg"]
    for name, content in drawn.items():
        assert content == digest(finished.folder / "results/figures" / name), name
    assert not (published / "runs").exists()
    posters = checkout.snakemake("-n", "-p", "poster", *arguments[1:], config=None)
    assert "--address= --out" in posters  # the config has none


def test_what_given_tables_do_not_hold_is_left_out(
    fresh: Checkout, finished: Checkout, tmp_path: Path
) -> None:
    checkout = fresh.copy(tmp_path / "checkout")
    tables = checkout.folder / "results/reference/machine/tables"
    tables.mkdir(parents=True)
    given = modules.raw_tables("figures", "speedup")
    for name in given:
        content = (finished.folder / f"results/tables/{name}.csv").read_bytes()
        (tables / f"{name}.csv").write_bytes(content)
    arguments = ("figures", "--config", "results=results/reference/machine")
    drawn = [name for name in NAMES if modules.raw_tables("figures", name) <= given]
    text = checkout.snakemake("--dry-run", *arguments, config=None)
    assert jobs(text) == {"tabulate": 2, "draw": len(drawn), "figures": 1}
    place = "results/reference/machine/tables"
    assert f"left out: figure transfers, since {place} has no transfers.csv\n" in text
    assert text.count("left out: figure ") == len(NAMES) - len(drawn)


def test_kill_in_the_middle_of_a_measurement(fresh: Checkout, tmp_path: Path) -> None:
    """kill -9 of everything while a run is measured; the next call needs no option to go on."""
    checkout = fresh.copy(tmp_path / "checkout")
    run = "results/runs/blobs/tiny/naive/b4/r1"
    log = checkout.folder / "results/logs/measure/blobs/tiny/naive/b4/r1.log"
    process = subprocess.Popen(
        checkout.command(f"{run}/run.json"),
        cwd=checkout.folder,
        env=environment(checkout.folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not log.exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (checkout.folder / run / "run.json").exists()
    # such a file is left by a run that was killed while it wrote
    (checkout.folder / run).mkdir(parents=True, exist_ok=True)
    (checkout.folder / run / "epochs.csv").write_text("cut o")
    checkout.snakemake(f"{run}/run.json")
    assert len(pd.read_csv(checkout.folder / run / "epochs.csv")) > 0
    assert json.loads((checkout.folder / run / "run.json").read_text())["status"] == "ok"


@pytest.mark.parametrize(
    ("overlay", "line"),
    [
        ("sweep: {stages: [naive, fuzed]}", "unknown stage 'fuzed' in sweep.stages; known: "),
        ("sweep: {stagse: [naive]}", "unknown key 'stagse' in config.sweep; known: "),
        ("figures: [speedpu]", "unknown name 'speedpu' in figures; known: "),
        ("{figures: [speedup, race], race: null}", "'race' in figures needs the section race"),
        ("networks: {tiny: [{conv: {maps: 2, kernel: 99}}, {dense: 3}]}", "network 'tiny'"),
    ],
)
def test_a_bad_config_is_one_clear_line(
    fresh: Checkout, tmp_path: Path, overlay: str, line: str
) -> None:
    settings = yaml.safe_load((fresh.folder / "tests/tiny.yaml").read_text())
    for key, value in yaml.safe_load(overlay).items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(settings))
    text = fresh.snakemake("all", config=str(bad), code=None)
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert line in errors[0]
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 2  # Snakemake itself says that a config file was added
