"""A stage whose file needs a library that is not here: its rows are `unavailable` and say why."""

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from cnnlib.device import Limits
from cnnlib.engine import Engine, Setup, Stage
from cnnlib.errors import Unsupported

RunsOn = Literal["cpu", "cuda", "any"]


class Unusable(Engine[Any]):
    """No engine: whatever is asked of it raises Unsupported with the reason."""

    why: str

    def __new__(cls, *arguments: object) -> NoReturn:
        raise Unsupported(cls.why)

    @classmethod
    def operators_on(cls, stage: Stage, setup: Setup, limits: Limits | None) -> Sequence[object]:
        raise Unsupported(cls.why)

    @classmethod
    def source_on(cls, stage: Stage, setup: Setup, limits: Limits) -> str:
        raise Unsupported(cls.why)


def unusable(name: str, why: str) -> Stage:
    """The record of a stage of this name whose file cannot be imported here."""
    reason = f"stage '{name}' {why}"
    engine = type("Unusable", (Unusable,), {"why": reason})
    # No device is opened for it: the machine may lack that, too.
    return Stage(name=name, title=name, change=why, runs_on="cpu", engine=engine)
