"""Plan graph of stage tuned with all of its techniques."""

from dataclasses import replace

from cnnlib.stages import tuned
from cnnlib.stages.tuned.graph import ProductOptions

STAGE = replace(
    tuned.GRAPH,
    name="graph_programmatic",
    title="graph plan",
    change="layer by layer, kernels of a CUDA graph begin before the one before has ended",
    options=ProductOptions(launch="programmatic", gather="device", arithmetic="f16x3"),
)
