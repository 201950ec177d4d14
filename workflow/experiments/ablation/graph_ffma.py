"""Plan graph of stage tuned without tensor cores."""

from dataclasses import replace

from cnnlib.stages import tuned
from cnnlib.stages.tuned.graph import ProductOptions

STAGE = replace(
    tuned.GRAPH,
    name="graph_ffma",
    title="graph plan, FFMA",
    change="as the graph plan, with products by float32 multiply-adds",
    options=ProductOptions(launch="programmatic", gather="device", arithmetic="ffma"),
)
