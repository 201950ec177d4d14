"""Plan graph of stage tuned with batches that the host brings together."""

from dataclasses import replace

from cnnlib.stages import tuned
from cnnlib.stages.tuned.graph import ProductOptions

STAGE = replace(
    tuned.GRAPH,
    name="graph_gathered_by_host",
    title="graph plan, host gathers",
    change="as the graph plan, with images brought together by the host",
    options=ProductOptions(launch="programmatic", gather="host", arithmetic="f16x3"),
)
