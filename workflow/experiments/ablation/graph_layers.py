"""Plan graph of stage tuned with a launch for each of the last layers, the loss and the images.

Without a head no launch counts a step before its update, which then gathers no images either.
"""

from dataclasses import replace

from cnnlib.stages import tuned
from cnnlib.stages.tuned.graph import ProductOptions

STAGE = replace(
    tuned.GRAPH,
    name="graph_layers",
    title="graph plan, last layers apart",
    change="as the graph plan, with launches for each of the last layers, loss and images",
    options=ProductOptions(launch="programmatic", gather="device", arithmetic="f16x3", head=0),
)
