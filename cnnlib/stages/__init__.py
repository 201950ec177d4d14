"""The ladder: every stage in the order in which one improves on another.

A stage is a module of this folder, or a package, with a record STAGE; nothing lists it.
"""

from cnnlib.engine import Stage
from cnnlib.errors import BrokenStage, ConfigError
from cnnlib.peers import PEERS
from cnnlib.stages._loading import BROKEN, module_of, modules, records
from cnnlib.stages._own import (
    declare,
    file_of,
    find_own,
    forget,
    installed,
    is_path,
    know,
    load_path,
    own_of,
)

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


__all__ = [
    "ALL",
    "BROKEN",
    "LADDER",
    "VARIANTS",
    "declare",
    "file_of",
    "find_stage",
    "forget",
    "installed",
    "is_path",
    "is_shipped",
    "know",
    "own_of",
    "problems",
]


def is_shipped(name: str) -> bool:
    """Whether a stage of the repository has this name, be it usable or not."""
    return name in BROKEN or any(stage.name == name for stage in (*LADDER, *VARIANTS, *PEERS))


def find_stage(name: str, where: str) -> Stage:
    """The stage called `name`, for the setting or the option called `where`.

    `name` may be the path of a file with a stage from outside the repository, which is imported
    here, and the name of one that an installed package brings (docs/extending/own-stage.md).

    Raises ConfigError naming `where` and the choices if there is none, BrokenStage if
    the module or the record of this stage is broken, or if two stages have this name.
    """
    if is_path(name):
        stage = load_path(name, where).stage
        for shipped in (*LADDER, *VARIANTS, *PEERS):
            if shipped.name == stage.name:
                raise BrokenStage(
                    f"stage {name} in {where} cannot be used: its name, {stage.name!r}, is also "
                    f"that of {module_of(shipped)}; rename one"
                )
        return stage
    if name in BROKEN:
        raise BrokenStage(f"stage {name!r} in {where} cannot be used: {BROKEN[name]}")
    stages = (*LADDER, *VARIANTS, *PEERS)
    found = [stage for stage in stages if stage.name == name]
    if len(found) > 1:
        raise BrokenStage(f"stage {name!r} in {where} is ambiguous: {_twice(found)}")
    if found:
        for point in installed():
            if point.name == name:
                raise BrokenStage(
                    f"stage {name!r} in {where} is ambiguous: {module_of(found[0])} has it, and so "
                    f"has entry point {point.name} = {point.value!r} of an installed package"
                )
        return found[0]
    if (own := find_own(name, where)) is not None:
        return own.stage
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
