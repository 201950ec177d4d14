"""Stage 2: the easy wins on the CPU. Micro-batches, convolution as a matrix product (BLAS), buffers
allocated once, float32, all cores.

What differs from stage 1 besides the batch is the convolution (conv.py): the windows of a whole row
of outputs are copied out of the source (im2col), and all maps' outputs of that row are one product
of matrices. Where there are many maps, winograd.py does with fewer multiplications. Maps lie in
memory as (H, C, W, N), the image innermost: see cnnlib/engine/cpu.py.
"""

from cnnlib.engine import Stage
from cnnlib.engine.cpu import MicroBatchEngine, MicroBatchOperator
from cnnlib.engine.stage import Planned, choosing
from cnnlib.layers import Activation, Array, Conv, Dense, Dropout, Subsample, Views
from cnnlib.stages.gemm.conv import MatrixConv
from cnnlib.stages.gemm.dense import MatrixDense
from cnnlib.stages.gemm.elementwise import MaskedDropout, WholeActivation
from cnnlib.stages.gemm.subsample import SlicedSubsample
from cnnlib.stages.gemm.winograd import WinogradConv, pays

__all__ = [
    "STAGE",
    "MaskedDropout",
    "MatrixConv",
    "MatrixDense",
    "SlicedSubsample",
    "WholeActivation",
    "WinogradConv",
    "convolution",
]


def faster(planned: Planned) -> type[MatrixConv | WinogradConv]:
    """The operator that takes less time for a convolution."""
    winograd = pays(planned.layer(Conv), planned.source_shape, planned.target_shape)
    return WinogradConv if winograd else MatrixConv


@choosing(faster)
def convolution(
    planned: Planned,
    source: Array,
    source_error: Array | None,
    parameters: Views,
    gradients: Views,
    may_overwrite: bool,
) -> MicroBatchOperator:
    """The faster operator, made."""
    return faster(planned)(planned, source, source_error, parameters, gradients, may_overwrite)


STAGE = Stage(
    name="gemm",
    title="2 gemm",
    change="mini-batches, convolution as matrix products (im2col and BLAS), buffers allocated "
    "once, float32, all cores",
    runs_on="cpu",
    engine=MicroBatchEngine,
    after="naive",
    color="#00897f",
    marker="s",
    operators={
        (Conv,): convolution,
        (Activation,): WholeActivation,
        (Subsample,): SlicedSubsample,
        (Dense,): MatrixDense,
        (Dropout,): MaskedDropout,
    },
)
