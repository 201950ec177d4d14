"""The table libraries: the last stage against the quickest library of each kind."""

import math

import pandas as pd
import pytest

from cnnlib.engine.plans import Plans
from cnnlib.engine.stage import options_of
from cnnlib.measuring import schema
from cnnlib.stages import find_stage
from tests.workflow.rows import epoch_rows
from workflow.glue import modules

pytestmark = pytest.mark.quick

TABLE = modules.load("tables", "libraries")
GPU = {"device": "an H100", "device_kind": "cuda", "dataset": "mnist", "batch_size": 64}
LENET5 = GPU | {"network": "lenet5"}


def kernel(stage: str, name: str, network: str) -> dict[str, object]:
    """A kernel of a stage that was timed at batch 64."""
    own = {"dataset": "mnist", "network": network, "stage": stage, "batch_size": 64}
    return own | {"repeat": 1, "kernel": name, "launches": 1}


def made(*parts: list[dict], kernels: list[dict[str, object]]) -> pd.DataFrame:
    rows = [row for part in parts for row in part]
    epochs = pd.DataFrame(rows, columns=list(schema.TABLES["epochs"]))
    timed = pd.DataFrame(kernels, columns=list(schema.TABLES["kernels"]))
    frame: pd.DataFrame = TABLE.make({"epochs": epochs, "kernels": timed})
    return frame


def test_each_network_is_compared_with_the_quickest_library_of_each_kind() -> None:
    other = GPU | {"network": "vgg6"}
    frame = made(
        epoch_rows("ring", [[5.0, 5.0]], **LENET5),
        epoch_rows("tuned", [[1.0, 1.0], [2.0, 2.0]], **LENET5),
        epoch_rows("torch", [[9.0], [9.0]], **LENET5),
        epoch_rows("jax", [[3.0], [3.0]], **LENET5),
        epoch_rows("torch_compile", [[0.1]], validated=False, **LENET5),  # does not count
        epoch_rows("torch_compile_tf32", [[1.2], [1.2]], **LENET5),
        epoch_rows("tuned", [[math.nan]], status="unavailable", **other),
        epoch_rows("ring", [[4.0]], **other),
        epoch_rows("jax", [[2.0]], **other),
        epoch_rows("tuned", [[1.0]], **GPU | {"network": "alone"}),  # without a library: no line
        kernels=[
            kernel("tuned", "leave_gradient", "lenet5"),
            kernel("tuned", "update", "lenet5"),
            kernel("jax", "gather", "lenet5"),
        ],
    )
    assert list(frame.columns) == list(TABLE.COLUMNS)
    assert list(frame["network"]) == ["lenet5", "vgg6"]
    one, two = frame.iloc[0], frame.iloc[1]
    assert (one["stage"], one["plan"], one["epoch_seconds"]) == ("tuned", "persistent", 1.5)
    assert (one["library"], one["library_seconds"], one["ratio"]) == ("jax", 3, 2)
    assert (one["ratio_low"], one["ratio_high"]) == (1.5, 3)
    assert (one["tf32_library"], one["tf32_ratio"]) == ("torch_compile_tf32", pytest.approx(0.8))
    assert (two["stage"], two["plan"], two["ratio"]) == ("ring", "", 0.5)
    assert (two["tf32_library"], math.isnan(two["tf32_ratio"])) == ("", True)
    assert TABLE.mean_ratio(frame["ratio"]) == pytest.approx(1)
    text = TABLE.markdown(frame)
    assert (
        "| 64 | 50.0 % | tuned | persistent | 1.50 s | JAX | 3.00 s | 2.0× (1.5× to 3.0×) |" in text
    )
    assert "| – | – | – |" in text
    again = pd.concat([frame, frame.assign(dataset="shapes", batch_size=128, ratio=7.0)])
    short = "| batch | `lenet5` | `vgg6` |\n| ---: | ---: | ---: |\n| 64 | 2.0× | 0.50× (ring) |\n"
    assert TABLE.short(again) == f"{short}| 128 | – | – |\n"
    assert "Against float32: 0.50× to 2.0×, geometric mean 1×." in text


def test_plans_are_known_by_their_kernels() -> None:
    both = made(
        epoch_rows("tuned", [[1.0], [1.0]], **LENET5),
        epoch_rows("jax", [[1.0]], **LENET5),
        kernels=[
            kernel("tuned", "leave_gradient", "lenet5"),
            kernel("tuned", "gather", "lenet5") | {"repeat": 2},
            kernel("tuned", "split_weights", "lenet5") | {"repeat": 3},
        ],
    )
    assert list(both["plan"]) == ["graph and persistent and stored"]
    plans = options_of(find_stage("tuned", "here"), Plans).plans
    assert {*TABLE.PLANS, "graph"} == {*plans, "stored"}  # the last one in published runs alone
