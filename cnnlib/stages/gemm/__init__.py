"""Stage 2: the easy wins on the CPU. Micro-batches, convolution as a matrix product (BLAS), buffers
allocated once, float32, all cores.

What differs from stage 1 besides the batch is the convolution (conv.py): the windows of a whole row
of outputs are copied out of the source (im2col), and all maps' outputs of that row are one product
of matrices. Maps lie in memory as (H, C, W, N), the image innermost: see cnnlib/engine/cpu.py.
"""

from cnnlib.engine import Stage
from cnnlib.engine.cpu import MicroBatchEngine
from cnnlib.layers import Activation, Conv, Dense, Dropout, Subsample
from cnnlib.stages.gemm.conv import MatrixConv
from cnnlib.stages.gemm.dense import MatrixDense
from cnnlib.stages.gemm.elementwise import MaskedDropout, WholeActivation
from cnnlib.stages.gemm.subsample import SlicedSubsample

__all__ = [
    "STAGE",
    "MaskedDropout",
    "MatrixConv",
    "MatrixDense",
    "SlicedSubsample",
    "WholeActivation",
]

STAGE = Stage(
    name="gemm",
    title="2 gemm",
    change="mini-batches, convolution as matrix products (im2col and BLAS), buffers allocated "
    "once, float32, all cores",
    runs_on="cpu",
    engine=MicroBatchEngine,
    after="naive",
    color="#0072b2",
    marker="s",
    operators={
        (Conv,): MatrixConv,
        (Activation,): WholeActivation,
        (Subsample,): SlicedSubsample,
        (Dense,): MatrixDense,
        (Dropout,): MaskedDropout,
    },
)
