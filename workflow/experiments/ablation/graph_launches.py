"""Plan graph of stage tuned without a graph: the host launches every kernel."""

from dataclasses import replace

from cnnlib.stages import tuned
from cnnlib.stages.tuned.graph import ProductOptions

STAGE = replace(
    tuned.GRAPH,
    name="graph_launches",
    title="graph plan, launches",
    change="layer by layer, each kernel launched by the host",
    options=ProductOptions(launch="each", gather="device", arithmetic="f16x3"),
)
