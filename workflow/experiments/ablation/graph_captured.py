"""Plan graph of stage tuned with graphs whose kernels begin when the one before has ended."""

from dataclasses import replace

from cnnlib.stages import tuned
from cnnlib.stages.tuned.graph import ProductOptions

STAGE = replace(
    tuned.GRAPH,
    name="graph_captured",
    title="graph plan, CUDA graphs",
    change="layer by layer, many steps in one CUDA graph",
    options=ProductOptions(launch="graph", gather="device", arithmetic="f16x3"),
)
