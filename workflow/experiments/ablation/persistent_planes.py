"""Plan persistent of stage tuned with convolutions whose numbers are split once, into FP16."""

from dataclasses import replace

from cnnlib.stages import tuned
from cnnlib.stages.tuned.plan import PersistentOptions

STAGE = replace(
    tuned.PERSISTENT,
    name="persistent_planes",
    title="persistent plan, FP16 planes",
    change="as the persistent plan, with convolutions of FP16 planes, numbers split once",
    options=PersistentOptions(products=("fp16", "tf32")),
)
