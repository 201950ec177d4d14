"""Plan persistent of stage tuned with convolutions that split floats where they multiply them."""

from dataclasses import replace

from cnnlib.stages import tuned
from cnnlib.stages.tuned.plan import PersistentOptions

STAGE = replace(
    tuned.PERSISTENT,
    name="persistent_tf32",
    title="persistent plan, TF32",
    change="as the persistent plan, with floats split into TF32 each time they are multiplied",
    options=PersistentOptions(products=("tf32",)),
)
