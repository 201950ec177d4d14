"""Which operator of the stage serves a convolution and what follows it."""

from contextlib import suppress

from cnnlib.engine import Planned, Stage, options_of
from cnnlib.engine.stage import declining
from cnnlib.errors import Unsupported
from cnnlib.layers import Conv
from cnnlib.stages.tuned.byte_plane_conv import TunedBytePlaneConv
from cnnlib.stages.tuned.conv import Convolution, TunedByteConv, TunedConv
from cnnlib.stages.tuned.declined import other_than_square
from cnnlib.stages.tuned.layout import Threads
from cnnlib.stages.tuned.plan import PersistentOptions
from cnnlib.stages.tuned.plane_conv import TunedPlaneConv


@declining(other_than_square)
def convolution(planned: Planned, stage: Stage, threads: Threads, images: int) -> Convolution:
    """The operator of a convolution: of planes where the stage's options want them and they fit, or
    else of floats; of the image's bytes where it is the first. An image with a border is never made
    of planes.
    """
    given = planned, stage, threads, images
    conv = planned.layer(Conv)
    takes_bytes = planned.is_first and conv.stride == (1, 1)
    if takes_bytes and any(conv.padding):
        with suppress(Unsupported):
            return TunedByteConv(*given)
        return TunedConv(*given)
    if "fp16" in options_of(stage, PersistentOptions).products:
        with suppress(Unsupported):
            return TunedBytePlaneConv(*given) if takes_bytes else TunedPlaneConv(*given)
    return TunedByteConv(*given) if takes_bytes else TunedConv(*given)
