"""Plan persistent of stage tuned with one team of threads in each block."""

from dataclasses import replace

from cnnlib.stages import tuned
from cnnlib.stages.tuned.plan import PersistentOptions

STAGE = replace(
    tuned.PERSISTENT,
    name="persistent_one_team",
    title="persistent plan, one team",
    change="as the persistent plan, with one team of threads a block",
    options=PersistentOptions(two_teams=False),
)
