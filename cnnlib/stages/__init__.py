"""The ladder: every stage in the order in which one improves on another."""

from cnnlib.engine import Stage
from cnnlib.errors import ConfigError
from cnnlib.stages import gemm, naive

LADDER: tuple[Stage, ...] = (naive.STAGE, gemm.STAGE)


def find_stage(name: str, place: str) -> Stage:
    """The stage called `name`; ConfigError naming `place` and the choices if there is none."""
    for stage in LADDER:
        if stage.name == name:
            return stage
    known = ", ".join(stage.name for stage in LADDER)
    raise ConfigError(f"unknown stage {name!r} in {place}; known: {known}")
