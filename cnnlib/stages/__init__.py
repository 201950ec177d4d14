"""The ladder: every stage in the order in which one improves on another."""

from cnnlib.engine import Stage
from cnnlib.errors import ConfigError
from cnnlib.peers import PEERS
from cnnlib.stages import fused, gemm, gemm_cuda, naive, ring, tuned

LADDER: tuple[Stage, ...] = (
    naive.STAGE,
    gemm.STAGE,
    gemm_cuda.STAGE,
    fused.STAGE,
    ring.STAGE,
    tuned.STAGE,
)
VARIANTS: tuple[Stage, ...] = (fused.PULL,)
"""Stages to compare a rung with; measured like any other, but no rung themselves."""
ALL: tuple[Stage, ...] = (*LADDER, *VARIANTS, *PEERS)


def find_stage(name: str, place: str) -> Stage:
    """The stage called `name`; ConfigError naming `place` and the choices if there is none."""
    stages = (*LADDER, *VARIANTS, *PEERS)
    for stage in stages:
        if stage.name == name:
            return stage
    known = ", ".join(stage.name for stage in stages)
    raise ConfigError(f"unknown stage {name!r} in {place}; known: {known}")
