"""Plan graph of stage tuned with each float as three BF16 values, whose range is a float's."""

from dataclasses import replace

from cnnlib.stages import tuned
from cnnlib.stages.tuned.graph import ProductOptions

STAGE = replace(
    tuned.GRAPH,
    name="graph_bf16",
    title="graph plan, BF16",
    change="as the graph plan, with products by six of BF16",
    options=ProductOptions(launch="programmatic", gather="device", arithmetic="bf16x6"),
)
