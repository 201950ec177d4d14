"""Two folders of results compared by the command, as a user calls it."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cnnlib.commands.compare import show
from cnnlib.comparing.comparison import Comparison
from cnnlib.comparing.comparison import compare as compare_folders
from cnnlib.measuring import schema
from cnnlib.paths import ROOT
from tests.support.command_line import Home
from tests.workflow.rows import epoch_rows

PUBLISHED = ROOT / "results/reference/nvidia-h100/earlier"
RUN = {"dataset": "blobs", "network": "tiny", "stage": "gemm", "batch_size": 8, "repeat": 1}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a folder as an experiment leaves it: each run's epochs and run.json."""

    def write(name: str, *rows: dict, settings: str = "", **facts: object) -> Path:
        runs: dict[str, list[dict]] = {}
        for row in rows:
            batch, repeat = f"b{row['batch_size']}", f"r{row['repeat']}"
            place = f"{row['dataset']}/{row['network']}/{row['stage']}/{batch}/{repeat}"
            runs.setdefault(place, []).append(row)
        for place, own in runs.items():
            run = tmp_path / name / "runs" / place
            schema.write(run / "epochs.csv", "epochs", own)
            known = {
                "status": own[-1]["status"],
                "run": RUN,
                **facts,
            }
            (run / "run.json").write_text(json.dumps(known))
        if settings:
            (tmp_path / name / "config.yaml").write_text(settings)
        return tmp_path / name

    return write


def several(stage: str, seconds: float, repeats: int = 5, **changes: object) -> list[dict]:
    """Rows of a run whose repeats differ by 1 %, never alike in two folders."""
    noise = np.random.default_rng(int(1e6 * seconds) + repeats).normal(1, 0.01, (repeats, 2))
    return epoch_rows(stage, (seconds * noise).tolist(), **changes)


def words(comparison: Comparison) -> dict[tuple[str, int], str]:
    return {(run.key.stage, run.key.batch_size): run.effect.word for run in comparison.runs}


def test_a_slowdown_put_into_a_copy_is_found(home: Home, tmp_path: Path) -> None:
    """By folders with published tables, with a run that does not work any longer; files agree."""
    slow = tmp_path / "slow/tables/epochs.csv"
    slow.parent.mkdir(parents=True)
    with (PUBLISHED / "epochs.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        if row["stage"] == "tuned":
            row["epoch_seconds"] = repr(1.05 * float(row["epoch_seconds"]))
        if (row["stage"], row["batch_size"]) == ("jax", "64"):
            row["status"], row["validated"] = "failed", "false"
    with slow.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    files = ("--out", "page.html", "--json", "all.json", "--csv", "verdicts.csv")
    home.capture.readouterr()
    assert home("compare", str(PUBLISHED), "slow", *files, code=1) == ""
    found = json.loads(Path("all.json").read_text())
    assert found["regressions"] == [
        "tuned (lenet5 on mnist), 9 batch sizes together: slower",
        "jax (lenet5 on mnist), batch 64: failed in B",
    ]
    verdicts = {(row["stage"], row["batch_size"]): row["verdict"] for row in found["effects"]}
    assert verdicts.pop(("tuned", 0)) == "slower"
    assert {word for (stage, _), word in verdicts.items() if stage != "tuned"} == {"same"}
    with open("verdicts.csv", newline="") as stream:
        assert [row["verdict"] for row in csv.DictReader(stream)] == [
            row["verdict"] for row in found["effects"]
        ]
    page = Path("page.html").read_text()
    assert "tuned (lenet5 on mnist), 9 batch sizes together: slower" in page
    assert not re.findall(r"(?:src|href)=", page)  # nothing is fetched
    assert "0 slower, 0 faster, 108 same" in home("compare", str(PUBLISHED), str(PUBLISHED))


def test_verdicts_and_differences_of_two_experiments(home: Home, write: Write) -> None:
    a = write(
        "a",
        *several("gemm", 1.0),
        *several("fused", 1.0),
        *several("ring", 1.0),
        *several("tuned", 1.0, repeats=1),
        *several("naive", 1.0),
        *several("torch", 1.0, status="unavailable", validated=False, reason="no torch"),
        settings="results: a\ntraining: {epochs: 2}\n",
        commit="a" * 40 + "+changes",
        driver="570.1",
        cores=8,
    )
    b = write(
        "b",
        *several("gemm", 1.2),
        *several("fused", 0.7),
        *several("ring", 1.001),
        *several("tuned", 1.3, repeats=1),
        *several("naive", 1.1, images=128),
        *several("torch", 1.3),
        *several("jax", 1.0),
        settings="results: b\ntraining: {epochs: 3}\n",
        commit="b" * 40,
        cores=8,
    )
    assert home("compare", "a", "b", code=1) == ""
    found = compare_folders(a, b)
    assert words(found) == {
        ("gemm", 8): "slower",
        ("fused", 8): "faster",
        ("ring", 8): "same",
        ("tuned", 8): "unsure",
    }
    assert {(each.what, each.a, each.b) for each in found.differences} == {
        ("commit", "a" * 12 + "+changes", "b" * 12),
        ("driver", "570.1", "unknown"),
        ("training.epochs", "2", "3"),
    }
    assert {each.key.stage: each.why for each in found.left_out} == {
        "naive": "their epochs have 64 and 128 images",
        "torch": "unavailable in A (no torch)",
        "jax": "only in B",
    }
    home.capture.readouterr()
    show(found)
    said = home.capture.readouterr().out
    assert re.search(r"code +commit +a{12}\+changes +b{12}\n", said)
    assert "unavailable in A (no torch): torch (tiny on blobs), batch 8" in said
    assert "REGRESSION: gemm (tiny on blobs), batch 8: slower" in said


def test_few_repeats_are_unsure_unless_others_say_how_far_repeats_differ(write: Write) -> None:
    pair = [write(f"two{time}", *several("gemm", time, repeats=2)) for time in (1.0, 1.5)]
    assert words(compare_folders(*pair)) == {("gemm", 8): "unsure"}
    more = [
        write(f"more{time}", *several("gemm", time, repeats=2), *several("naive", time))
        for time in (1.0, 1.5)
    ]
    found = compare_folders(*more)
    assert words(found) == {("gemm", 8): "slower", ("naive", 8): "slower"}
    assert found.regressions == ["naive (tiny on blobs), batch 8: slower"]


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("missing", "missing is not there; it must be a folder of results"),
        ("config.yaml", "config.yaml is no folder"),
        ("empty", "empty is no folder of results: there is neither empty/runs nor"),
        ("machines", "nor machines/epochs.csv; in it are: machines/mine"),
        ("cut", "cut/epochs.csv, row 9: 17 cells, not 18: cut off?"),
        (
            "negative",
            "negative/epochs.csv is damaged: -1.0 is the time of an epoch of gemm, batch",
        ),
        ("other", "have no run in common: data set mnist"),
        ("facts", "facts/run.json is damaged: it is not JSON"),
        ("kinds", "kinds/run.json is damaged: its settings is 3"),
        ("settings", "settings/config.yaml is not YAML"),
    ],
)
def test_bad_folders_are_named(home: Home, tmp_path: Path, what: str, named: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "machines/mine/tables").mkdir(parents=True)
    shutil.copy(PUBLISHED / "epochs.csv", tmp_path / "machines/mine/tables")
    for name in ("cut", "negative", "other", "facts", "kinds", "settings"):
        (tmp_path / name).mkdir()
        table = tmp_path / name / "epochs.csv"
        shutil.copy(PUBLISHED / "epochs.csv", table)
        lines = table.read_text().splitlines()[:9]
        if name == "cut":
            lines[8] = lines[8].rpartition(",")[0]
        elif name == "negative":
            lines[3] = re.sub(r",(\d+\.\d+),nan", ",-1,nan", lines[3], count=1)
        elif name == "other":
            lines = [line.replace("lenet5", "lenet9") for line in lines]
        table.write_text("\n".join(lines) + "\n")
    (tmp_path / "facts/run.json").write_text("{")
    (tmp_path / "kinds/run.json").write_text('{"status": "ok", "settings": 3}')
    (tmp_path / "settings/config.yaml").write_text("a: [")
    said = home.fails("compare", str(once(tmp_path)), what, "--out", "page.html")
    assert named in said
    assert not (tmp_path / "page.html").exists()


def once(folder: Path) -> Path:
    """A folder in `folder` with the first repeat of the first published runs."""
    made = folder / "once"
    made.mkdir()
    rows = (PUBLISHED / "epochs.csv").read_text().splitlines()[:9]
    (made / "epochs.csv").write_text("\n".join(rows) + "\n")
    return made


def test_options_that_do_not_go_together(home: Home, tmp_path: Path) -> None:
    assert "two folders, or one" in home.fails("compare", "a")
    assert "two folders, or one" in home.fails("compare", "a", "b", "--halves")
    assert "--threshold must be from 0" in home.fails("compare", "a", "b", "--threshold", "-1")
    assert "no run in" in home.fails("compare", str(once(tmp_path)), "--halves")
