"""Plan `graph` of stage tuned: layer by layer, each of its products one kernel.

A convolution or a fully connected layer takes along the activation, subsampling and dropout that
follow it, forward and backward; the errors of its sums are made of those of its target when a
kernel needs them. What none of these operators takes is served by those of stage gemm_cuda.
  windows.py    a convolution as its products see it
  tiles.py      which part of a product a block makes
  options.py    the arithmetic of the products
  operators.py  the launches
  head.py       the last layers and the loss in one launch
  engine.py     a step of these launches
"""

from cnnlib.engine.gpu_operator import GpuFactory
from cnnlib.layers import Activation, Conv, Dense, Dropout, Layer, Subsample
from cnnlib.stages.gemm_cuda import GemmActivation, GemmDropout, GemmSubsample
from cnnlib.stages.tuned.graph.engine import GraphEngine
from cnnlib.stages.tuned.graph.operators import GraphConv, GraphDense
from cnnlib.stages.tuned.graph.options import ProductOptions

OPERATORS: dict[tuple[type[Layer], ...], GpuFactory] = {
    **{
        (*run, *last): GraphDense if Dense in run else GraphConv
        for run in (
            (Conv, Activation, Subsample),
            (Conv, Subsample),
            (Conv, Activation),
            (Conv,),
            (Dense, Activation),
            (Dense,),
        )
        for last in ((Dropout,), ())
    },
    (Activation,): GemmActivation,
    (Subsample,): GemmSubsample,
    (Dropout,): GemmDropout,
}

__all__ = [
    "OPERATORS",
    "GraphConv",
    "GraphDense",
    "GraphEngine",
    "ProductOptions",
]
