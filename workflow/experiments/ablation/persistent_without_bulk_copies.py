"""Plan persistent of stage tuned without the copy engine: threads copy the weights themselves."""

from dataclasses import replace

from cnnlib.stages import tuned
from cnnlib.stages.tuned.plan import PersistentOptions

STAGE = replace(
    tuned.PERSISTENT,
    name="persistent_without_bulk_copies",
    title="persistent plan, no bulk copies",
    change="as the persistent plan, with weights copied by all threads of a block",
    options=PersistentOptions(bulk_copies=False),
)
