"""The tables summary and ladder: counts, medians, speedups, and lines without a result."""

import math

import pandas as pd
import pytest

from tests.workflow.rows import epoch_rows, ladder, line, step_rows, summarise
from workflow.glue import modules
from workflow.plotting import wording

pytestmark = pytest.mark.quick


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
    assert "disturbed" in modules.load("tables", "ladder").markdown(
        ladder(
            epoch_rows("naive", [[20.0]]),
            epoch_rows("gemm", [[1.0], [2.0]], status="disturbed"),
        )
    )


def test_without_a_first_stage_there_is_no_other_baseline_at_that_batch_size() -> None:
    """A speedup over another stage would look like one over the baseline, which did not run."""
    naive = epoch_rows("naive", [[2.0]])
    other = epoch_rows("gemm", [[1.0]]) + epoch_rows("gemm", [[1.0]], batch_size=16)
    summary = summarise(naive, other).set_index("batch_size")
    assert summary.loc[16, "baseline"] == ""
    assert math.isnan(summary.loc[16, "speedup"])


def test_the_same_rows_give_the_same_table() -> None:
    rows = [epoch_rows("naive", [[5.0, 6.0], [7.0]]), epoch_rows("gemm", [[1.0], [1.3], [1.1]])]
    pd.testing.assert_frame_equal(summarise(*rows), summarise(*rows))


def test_the_ladder_says_what_did_not_fit_and_what_is_emulated() -> None:
    made = ladder(
        epoch_rows("naive", [[7200.0]], extrapolated=True),
        epoch_rows("ring", [[math.nan]], status="unjudged", validated=False),
        epoch_rows("gemm", [[math.nan]], status="does_not_fit"),
        epoch_rows(
            "fused", [[60.0]], device="a cpu (kernels built by g++)", device_kind="emulated"
        ),
    )
    text = modules.load("tables", "ladder").markdown(made)
    assert "2.00 h *" in text
    assert "does not fit" in text
    assert "not judged" in text
    assert f"({wording.EMULATED})" in text
    assert "120×" in text
    assert "above 100 %" not in modules.load("tables", "ladder").markdown(made.assign(share=0.9))
    assert "above 100 %" in modules.load("tables", "ladder").markdown(made.assign(share=3.4))
