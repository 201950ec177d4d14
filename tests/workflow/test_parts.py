"""Tables, wording, labels and the lists of sources, without Snakemake."""

import dataclasses
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnlib.errors import DataError
from cnnlib.measuring import schema
from cnnlib.stages import LADDER
from workflow.glue import config_schema, modules, sources
from workflow.plotting import layout, style, wording

pytestmark = pytest.mark.quick


def epoch_rows(stage: str, seconds: list[list[float]], **changes) -> list[dict]:
    """Rows of one line: a list of epoch times for each repeat."""
    return [
        {
            "dataset": "blobs",
            "network": "tiny",
            "stage": stage,
            "device": "a cpu",
            "batch_size": 8,
            "seed": repeat,
            "repeat": repeat,
            "epoch": epoch,
            "images": 64,
            "epoch_seconds": time,
            "event_seconds": math.nan,
            "loss": 1.0,
            "test_accuracy": 0.5,
            "device_kind": "cpu",
            "status": "ok",
            "validated": True,
            "extrapolated": False,
            **changes,
        }
        for repeat, times in enumerate(seconds, 1)
        for epoch, time in enumerate(times, 1)
    ]


def step_rows(stage: str, seconds: list[float]) -> list[dict]:
    shared = set(schema.TABLES["steps"]) & set(schema.TABLES["epochs"])
    line = {k: v for k, v in epoch_rows(stage, [[1.0]])[0].items() if k in shared}
    return [line | {"step": i, "step_seconds": time} for i, time in enumerate(seconds, 1)]


def summarise(*parts: list[dict], steps: list[dict] | None = None) -> pd.DataFrame:
    tables = {
        "epochs": pd.DataFrame(itertools.chain(*parts), columns=list(schema.TABLES["epochs"])),
        "steps": pd.DataFrame(steps or [], columns=list(schema.TABLES["steps"])),
    }
    return modules.load("tables", "summary").make(tables)


def line(summary: pd.DataFrame, stage: str) -> pd.Series:
    (found,) = (row for _, row in summary[summary["stage"] == stage].iterrows())
    return found


def test_the_summary_counts_and_takes_medians() -> None:
    summary = summarise(
        epoch_rows("gemm", [[1.0, 2.0], [3.0, 4.0]]),
        epoch_rows("naive", [[20.0, 20.0], [30.0, 30.0]], extrapolated=True),
        steps=step_rows("gemm", [0.1, 0.2, 0.3]),
    )
    assert list(summary["stage"]) == ["naive", "gemm"]  # as on the ladder
    gemm = line(summary, "gemm")
    assert (gemm["n"], gemm["repeats"]) == (4, 2)
    assert gemm["epoch_seconds"] == 2.5
    assert gemm["epoch_seconds_min"] == 1.0
    assert (gemm["epoch_seconds_q25"], gemm["epoch_seconds_q75"]) == (1.75, 3.25)
    assert (gemm["steps_timed"], gemm["step_seconds"]) == (3, 0.2)
    assert not gemm["extrapolated"]
    assert line(summary, "naive")["extrapolated"]


def test_the_speedup_is_over_the_lowest_stage_with_an_interval_over_repeats() -> None:
    summary = summarise(
        epoch_rows("naive", [[20.0], [20.0]], extrapolated=True), epoch_rows("gemm", [[1.0], [2.0]])
    )
    naive, gemm = line(summary, "naive"), line(summary, "gemm")
    assert naive["speedup"] == naive["speedup_low"] == naive["speedup_high"] == 1
    assert gemm["baseline"] == "naive"
    assert gemm["baseline_extrapolated"]
    assert gemm["speedup"] == pytest.approx(20 / 1.5)
    # two repeats: drawn with replacement they are all slow or all quick in one case of four
    assert (gemm["speedup_low"], gemm["speedup_high"]) == (10, 20)


def test_one_repeat_has_no_interval() -> None:
    summary = summarise(epoch_rows("naive", [[2.0]]), epoch_rows("gemm", [[1.0, 1.5]]))
    gemm = line(summary, "gemm")
    assert gemm["speedup"] == pytest.approx(1.6)
    assert math.isnan(gemm["speedup_low"])
    assert math.isnan(gemm["epoch_seconds_high"])


def test_a_stage_without_a_result_stays_in_the_summary() -> None:
    failed = epoch_rows("gemm", [[math.nan]], status="does_not_fit", validated=False)
    summary = summarise(epoch_rows("naive", [[2.0]]), failed)
    gemm = line(summary, "gemm")
    assert (gemm["n"], gemm["status"], gemm["validated"]) == (0, "does_not_fit", False)
    assert math.isnan(gemm["speedup"])


def test_disturbed_runs_do_not_count() -> None:
    disturbed = {"status": "disturbed"}
    quiet = epoch_rows("gemm", [[1.0], [2.0]])
    loud = [row | disturbed | {"repeat": 3} for row in epoch_rows("gemm", [[9.0]])]
    steps = step_rows("gemm", [0.1]) + [row | disturbed for row in step_rows("gemm", [0.9])]
    summary = summarise(quiet, loud, steps=steps)
    gemm = line(summary, "gemm")
    assert (gemm["status"], gemm["n"], gemm["repeats"]) == ("ok", 2, 2)
    assert gemm["epoch_seconds"] == 1.5
    assert (gemm["steps_timed"], gemm["step_seconds"]) == (1, 0.1)


def test_a_line_that_was_only_disturbed_says_so() -> None:
    summary = summarise(
        epoch_rows("naive", [[20.0]]),
        epoch_rows("gemm", [[1.0], [2.0]], status="disturbed"),
        steps=[row | {"status": "disturbed"} for row in step_rows("gemm", [0.9])],
    )
    gemm = line(summary, "gemm")
    assert (gemm["status"], gemm["n"], gemm["steps_timed"]) == ("disturbed", 0, 0)
    assert math.isnan(gemm["epoch_seconds"])
    assert math.isnan(gemm["speedup"])
    ladder = modules.load("tables", "ladder")
    assert "disturbed" in ladder.markdown(ladder.make({"summary": summary}))


def test_every_status_has_its_word() -> None:
    assert set(wording.STATUS) == set(schema.CHOICES["status"]) - {"ok"}


def test_without_a_first_stage_there_is_no_other_baseline_at_that_batch_size() -> None:
    """Where the baseline did not run, a speedup over another stage would look like one over it."""
    naive = epoch_rows("naive", [[2.0]])
    other = epoch_rows("gemm", [[1.0]]) + epoch_rows("gemm", [[1.0]], batch_size=16)
    summary = summarise(naive, other).set_index("batch_size")
    assert summary.loc[16, "baseline"] == ""
    assert math.isnan(summary.loc[16, "speedup"])


def test_the_same_rows_give_the_same_table() -> None:
    rows = [epoch_rows("naive", [[5.0, 6.0], [7.0]]), epoch_rows("gemm", [[1.0], [1.3], [1.1]])]
    pd.testing.assert_frame_equal(summarise(*rows), summarise(*rows))


def test_the_ladder_says_what_did_not_fit_and_what_is_emulated() -> None:
    summary = summarise(
        epoch_rows("naive", [[7200.0]], extrapolated=True),
        epoch_rows("ring", [[math.nan]], status="unjudged", validated=False),
        epoch_rows("gemm", [[math.nan]], status="does_not_fit"),
        epoch_rows(
            "fused", [[60.0]], device="a cpu (kernels built by g++)", device_kind="emulated"
        ),
    )
    ladder = modules.load("tables", "ladder")
    text = ladder.markdown(ladder.make({"summary": summary}))
    assert "2.00 h *" in text
    assert "does not fit" in text
    assert "not judged" in text
    assert f"({wording.EMULATED})" in text
    assert "120×" in text


@pytest.mark.parametrize("name", ["speedup", "latency"])
@pytest.mark.parametrize(
    "trouble", ["none", "failures", "unjudged", "one size", "all failed", "emulated only"]
)
def test_figures_draw_whatever_the_tables_hold(name: str, trouble: str) -> None:
    failed = {"status": "diverged", "epoch_seconds": math.nan}
    naive = epoch_rows("naive", [[9.0], [8.0]], extrapolated=True)
    gemm = epoch_rows("gemm", [[1.0], [2.0]])
    fused = epoch_rows("fused", [[3.0]], device="a cpu, g++", device_kind="emulated")
    rows = {
        "none": [naive, gemm, epoch_rows("gemm", [[0.5]], batch_size=64), fused],
        "failures": [naive, gemm, epoch_rows("gemm", [[1.0]], batch_size=64, **failed)],
        "unjudged": [naive, epoch_rows("gemm", [[math.nan]], status="unjudged", validated=False)],
        "one size": [naive, gemm],
        "all failed": [epoch_rows("gemm", [[1.0]], **failed)],
        "emulated only": [fused],
    }[trouble]
    style.apply()
    epochs = pd.DataFrame(itertools.chain(*rows), columns=list(schema.TABLES["epochs"]))
    tables = {"summary": summarise(*rows), "epochs": epochs}
    figure = modules.load("figures", name).draw(tables, layout.OWN_PAGE).figure
    figure.canvas.draw()
    drawn = [text.get_text() for axes in figure.axes for text in axes.texts]
    titles = " ".join(axes.get_title(loc="left") for axes in figure.axes)
    flat = list(itertools.chain(*rows))
    assert (wording.EMULATED in titles) == any(row["device_kind"] == "emulated" for row in flat)
    if any(row["status"] == "diverged" for row in flat):
        assert any("diverged" in text for text in drawn)
    if trouble == "unjudged":
        assert any("not judged" in text for text in drawn)


@given(
    st.lists(st.floats(0, 300, allow_nan=False), min_size=1, max_size=12).map(sorted),
    st.floats(5, 20),
)
def test_labels_do_not_overlap_and_stay_close(wanted: list[float], gap: float) -> None:
    placed = style.spread(wanted, gap, -1000, 1000)
    assert len(placed) == len(wanted)
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(placed))
    assert max(abs(p - w) for p, w in zip(placed, wanted, strict=True)) <= gap * len(wanted)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (25200, "7.00 h"),
        (150, "2.50 min"),
        (60, "60.0 s"),
        (3.7249, "3.72 s"),
        (0.0154, "15.4 ms"),
        (0.00123456, "1.23 ms"),
        (2.5e-6, "2.50 µs"),
        (math.nan, "-"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("factor", "text"),
    [(1, "1×"), (0.854, "0.85×"), (9.21, "9.2×"), (141.3, "141×"), (12345, "12,300×")],
)
def test_ratios_read_well(factor: float, text: str) -> None:
    assert wording.times(factor) == text


def test_every_stage_of_the_ladder_has_its_own_colour_and_mark() -> None:
    marks = [style.mark(stage.name) for stage in LADDER]
    assert (
        len({mark.color for mark in marks}) == len({mark.marker for mark in marks}) == len(LADDER)
    )


def test_a_stage_made_from_another_is_not_drawn_like_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the other's colour and mark in its record, as long as it says nothing of its own."""
    ring = LADDER[4]
    copy = dataclasses.replace(ring, name="ring_copy")
    own = dataclasses.replace(ring, name="ring_own", color="#123456", marker="*")
    plain = dataclasses.replace(ring, name="ring_plain", color="", marker="")
    monkeypatch.setattr(style, "ALL", (*LADDER, copy, own, plain))
    assert style.mark("ring") == style.Mark(ring.color, ring.marker)
    assert style.mark("ring_own") == style.Mark("#123456", "*")
    assert {style.mark("ring_copy"), style.mark("ring_plain")} <= set(style.OTHERS)
    assert style.mark("a stage of an old table") in style.OTHERS


def test_the_schema_is_that_of_the_config() -> None:
    assert config_schema.FILE.read_text(encoding="utf-8") == config_schema.schema(), (
        "workflow/schemas/config.schema.json is out of date: python -m workflow.glue.config_schema"
    )


def test_only_one_measurement_at_a_time(tmp_path: Path) -> None:
    """The second command starts when the first has ended, even if who started that is gone."""
    log, go = tmp_path / "log", tmp_path / "go"
    script = f"echo begin >> '{log}'; until [ -e '{go}' ]; do sleep 0.05; done; echo end >> '{log}'"
    command = [sys.executable, "-m", "workflow.glue.exclusive", "sh", "-c", script]
    options: dict[str, Any] = dict(
        cwd=sources.ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    first = subprocess.Popen(command, **options)
    while not log.exists():
        assert first.poll() is None
        time.sleep(0.02)
    second = subprocess.Popen(command, **options)
    assert second.stderr is not None
    assert "waiting for another measurement" in second.stderr.readline()
    assert log.read_text().split() == ["begin"]
    go.touch()
    assert [process.communicate(timeout=60)[1] for process in (first, second)] == ["", ""]
    assert log.read_text().split() == ["begin", "end"] * 2


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "its columns are not those of workflow/tables/summary.py"),
    "another column": (lambda text: text.replace("stage", "stages", 1), "its columns are not"),
    "no rows": (lambda text: text.partition("\n")[0] + "\n", "its end is missing"),
    "cut off": (lambda text: text[:-30], "its end is missing"),
    "a field too many": (lambda text: text[:-1] + ",1\n", r"line 3 has 30 fields, not 29"),
    "no number": (lambda text: text.replace(",8,", ",eight,", 1), "'eight' as batch_size"),
    "bytes": (lambda text: text.replace("gemm", "g\0mm"), r"'g\\x00mm' as stage"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_summary_is_named_and_not_drawn(tmp_path: Path, damage: str) -> None:
    summary = summarise(epoch_rows("naive", [[2.0]]), epoch_rows("gemm", [[1.0, 1.5]]))
    file = tmp_path / "summary.csv"
    summary.to_csv(file, index=False, na_rep="nan", float_format="%.9g", lineterminator="\n")
    text = file.read_text()
    read = modules.read_tables([file])["summary"]
    assert list(read["speedup"]) == pytest.approx(list(summary["speedup"]))
    change, problem = DAMAGE[damage]
    assert change(text) != text
    file.write_text(change(text))
    with pytest.raises(DataError, match=problem) as caught:
        modules.read_tables([file])
    assert str(file) in str(caught.value)
    assert "made again" in str(caught.value)


@pytest.mark.parametrize("name", ["007", "1e5", "nan", "NA", "None", "true", "1_000", "inf"])
def test_names_that_look_like_numbers_stay_names(tmp_path: Path, name: str) -> None:
    names = {"dataset": name, "network": name, "device": name}
    summary = summarise(epoch_rows("naive", [[2.0]], **names), epoch_rows(name, [[1.0]], **names))
    file = tmp_path / "summary.csv"
    summary.to_csv(file, index=False, na_rep="nan", float_format="%.9g", lineterminator="\n")
    read = modules.read_tables([file])["summary"]
    for column in ("dataset", "network", "device", "stage", "baseline"):
        assert list(read[column]) == list(summary[column])
    assert read["speedup"].tolist() == [1, 2]
    assert f"**{name} on {name}**" in modules.load("tables", "ladder").markdown(
        modules.load("tables", "ladder").make({"summary": read})
    )


def test_a_table_that_nobody_makes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no table that is read has this name"):
        modules.read_tables([tmp_path / "other.csv"])
