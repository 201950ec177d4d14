"""Figures of speedup and latency draw whatever the tables hold."""

import itertools
import math

import pandas as pd
import pytest

from cnnlib.measuring import schema
from tests.workflow.rows import epoch_rows, ladder, summarise
from workflow.glue import modules
from workflow.plotting import layout, style, wording

pytestmark = pytest.mark.quick


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
    tables = {"summary": summarise(*rows), "ladder": ladder(*rows), "epochs": epochs}
    figure = modules.load("figures", name).draw(tables, layout.OWN_PAGE).figure
    figure.canvas.draw()
    drawn = [text.get_text() for axes in figure.axes for text in axes.texts]
    titles = " ".join(axes.get_title(loc="left") for axes in figure.axes)
    flat = list(itertools.chain(*rows))
    emulated = any(row["device_kind"] == "emulated" for row in flat)
    if name == "speedup" and not all(row["device_kind"] == "emulated" for row in flat):
        # beside measured stages they have no gain
        words = " ".join(text.get_text() for text in figure.texts)
        assert ("Emulated, so checked and without times: fused." in words) == emulated
        assert wording.EMULATED not in titles + words
    else:
        assert (wording.EMULATED in titles) == emulated
    if any(row["status"] == "diverged" for row in flat):
        assert any("diverged" in text for text in drawn)
    if trouble == "unjudged":
        assert any("not judged" in text for text in drawn)
