"""The ladder: every stage in the order in which one improves on another.

A stage is a module of this folder, or a package, with a record STAGE; nothing lists it.
"""

from cnnlib.engine import Stage
from cnnlib.errors import BrokenStage, ConfigError
from cnnlib.peers import PEERS
from cnnlib.stages._loading import BROKEN, module_of, modules, records

LADDER: tuple[Stage, ...]
"""The records STAGE of the modules of this folder, in the order that their `after` gives. A broken
one is left out, and reported when its stage is asked for.
"""
VARIANTS: tuple[Stage, ...]
"""The records in the modules' VARIANTS: stages to compare a rung with, measured like any other, but
no rungs themselves.
"""
LADDER, VARIANTS = records(modules())
ALL: tuple[Stage, ...] = (*LADDER, *VARIANTS, *PEERS)


def find_stage(name: str, where: str) -> Stage:
    """The stage called `name`, for the setting or the option called `where`.

    Raises ConfigError naming `where` and the choices if there is none, BrokenStage if
    the module or the record of this stage is broken, or if two stages have this name.
    """
    if name in BROKEN:
        raise BrokenStage(f"stage {name!r} in {where} cannot be used: {BROKEN[name]}")
    stages = (*LADDER, *VARIANTS, *PEERS)
    found = [stage for stage in stages if stage.name == name]
    if len(found) > 1:
        raise BrokenStage(f"stage {name!r} in {where} is ambiguous: {_twice(found)}")
    if found:
        return found[0]
    known = ", ".join(stage.name for stage in stages)
    text = f"unknown stage {name!r} in {where}; known: {known}"
    if BROKEN:
        text += f" (unusable: {'; '.join(BROKEN.values())})"
    raise ConfigError(text)


def problems() -> list[str]:
    """One line for every stage that cannot be used, saying why."""
    lines = [f"stage {name!r} cannot be used: {why}" for name, why in BROKEN.items()]
    for name in dict.fromkeys(stage.name for stage in ALL):
        found = [stage for stage in ALL if stage.name == name]
        if len(found) > 1:
            lines.append(f"stage {name!r} is ambiguous: {_twice(found)}")
    return lines


def _twice(found: list[Stage]) -> str:
    return f"{' and '.join(module_of(stage) for stage in found)} both have it; rename one"
