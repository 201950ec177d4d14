"""Plan graph of stage tuned with each float as two TF32 values."""

from dataclasses import replace

from cnnlib.stages import tuned
from cnnlib.stages.tuned.graph import ProductOptions

STAGE = replace(
    tuned.GRAPH,
    name="graph_tf32",
    title="graph plan, TF32",
    change="as the graph plan, with products by three of TF32",
    options=ProductOptions(launch="programmatic", gather="device", arithmetic="tf32x3"),
)
