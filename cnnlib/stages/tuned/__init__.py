"""Stage 5: two plans. Where both take a network the faster one trains it: a GPU measures once which
that is. Without one it is the first.

Plan `persistent`: one launch trains a whole epoch, and weights stay in shared memory. The data set
lies on the GPU as bytes. Every block takes its images through the network, with as many of the
weights in its shared memory as fit; then every block updates a share of the weights. Tensor cores
multiply with float32 accuracy (kernels/tensor.cuh). If the maps of an image and the weights of the
convolutions do not fit a block, the network is declined with the sizes; weights of dense layers may
stay in device memory.

What differs from the other stages: each operator gives numbers for a struct (`config`, `buffers`)
instead of launches, and the kernels are templates over these structs (kernels/tuned/step.cuh).
  layout.py    where everything lies in a block's shared memory
  schedule.py  how warps share a convolution's products
  plan.py      how many images a block takes together, by which threads; the generated source
  engine.py    the engine, which may choose among layouts by measuring

Plan `graph`: layer by layer, for every network. The images are gathered on the GPU, and many steps
are launched by one call, as a CUDA graph whose kernels begin before the one before has ended.
  graph/       the operators of this plan

The engine that chooses is cnnlib/engine/plans.py; run.json and `cnnlib plan` name the plan.
"""

from dataclasses import replace

from cnnlib.engine import Stage
from cnnlib.engine.plans import EngineOfPlans, Plans
from cnnlib.layers import Activation, Conv, Dense, Dropout, Subsample
from cnnlib.stages.tuned import graph
from cnnlib.stages.tuned.convolution import convolution
from cnnlib.stages.tuned.dense import TunedDense
from cnnlib.stages.tuned.dropout import TunedDropout
from cnnlib.stages.tuned.elementwise import TunedElementwise
from cnnlib.stages.tuned.engine import PersistentEngine
from cnnlib.stages.tuned.plan import PersistentOptions

PERSISTENT = Stage(
    name="tuned",
    title="5 tuned, persistent",
    change="a whole epoch in one launch; weights in shared memory, images gathered on the GPU",
    runs_on="cuda",
    engine=PersistentEngine,
    operators={
        (Conv, Activation, Subsample): convolution,
        (Conv, Subsample): convolution,
        (Conv, Activation): convolution,
        (Conv,): convolution,
        (Dense, Activation): TunedDense,
        (Dense,): TunedDense,
        (Activation,): TunedElementwise,
        (Subsample,): TunedElementwise,
        (Dropout,): TunedDropout,
    },
)

GRAPH = Stage(
    name="tuned",
    title="5 tuned, graph",
    change="layer by layer, many steps in one CUDA graph; images gathered on the GPU",
    runs_on="cuda",
    engine=graph.GraphEngine,
    operators=graph.OPERATORS,
    options=graph.ProductOptions(launch="programmatic", gather="device"),
)

STAGE = Stage(
    name="tuned",
    title="5 tuned",
    change="a whole epoch in one launch; weights in shared memory, images gathered on the GPU",
    runs_on="cuda",
    engine=EngineOfPlans,  # type: ignore[type-abstract]  # it makes another engine
    after="ring",
    color="#cf3c00",
    marker="P",
    options=Plans({"persistent": PERSISTENT, "graph": GRAPH}, compared=True),
)

SPLIT_AT_USE = replace(
    STAGE,
    name="tuned_split_at_use",
    title="tuned, split at use",
    change="as tuned, with convolutions that split floats into TF32 each time they are multiplied",
    color="#e69f00",
    marker="X",
    options=Plans(
        {
            "persistent": replace(
                PERSISTENT,
                name="tuned_split_at_use",
                options=PersistentOptions(products=("tf32",)),
            ),
            "graph": replace(GRAPH, name="tuned_split_at_use"),
        },
        compared=True,
    ),
)
VARIANTS = (SPLIT_AT_USE,)
