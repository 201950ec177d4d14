"""Plan persistent of stage tuned with all of its techniques."""

from dataclasses import replace

from cnnlib.stages import tuned

STAGE = replace(
    tuned.PERSISTENT,
    name="persistent",
    title="persistent plan",
    change="a whole epoch in one launch",
)
