"""The command that writes the start of a stage outside the repository."""

import importlib
import inspect
from pathlib import Path
from string import Template
from typing import Annotated

import typer

ENGINES = ("numpy", "torch")
"""Libraries for which there is the start of a training loop: cnnlib/commands/starts/."""

START = Template('''\
"""Stage $name: stage $base with fully connected layers of its own.

    cnnlib plan --stage ./$name.py      which operator serves which layers
    cnnlib check --stage ./$name.py     compares it with the reference
    sweep: {stages: [$base, ./$name.py]}   in a config measures it and draws it beside others

A stage is a record of choices. What is not named in `replace` is as in stage $base.
"""

from dataclasses import replace

from cnnlib.layers import $kinds
from cnnlib.stages import $base
from $module import $operator


class MyDense($operator):
    """A fully connected layer: as in stage $base until something is changed here.

    Its methods are those of $operator; override what you want to change.$kernels
    """


STAGE = replace(
    $base.$record,
    name="$name",  # in results and on the command line: no other stage may have it
    title="$name",  # in figures and tables
    change="stage $base with fully connected layers of its own",
    after="$base",  # the stage that it improves on
    color="",  # such as "#c2185b"; "": one that is free
    marker="",  # one of Matplotlib's characters; "": one that is free
    # Which operator serves which layers. The longest run counts: fusing is a longer key.
    operators={
        **$base.$record.operators,
$entries
    },
)
''')

KERNELS = """

    To change its kernels, copy kernels/{file} to {own} beside this file, name that
    here (file = "{own}"), call its last macro {macro} and write its includes as
    they are seen from kernels/: "layers.cuh", not "../layers.cuh".
    """


def new_stage(
    name: Annotated[str, typer.Argument(help="The stage's name; the file is NAME.py, here.")],
    base: Annotated[
        str,
        typer.Option("--from", help="A stage of the ladder, whose operator is replaced."),
    ] = "ring",
    engine: Annotated[
        str | None,
        typer.Option(help=f"A training loop of its own instead: {' or '.join(ENGINES)}."),
    ] = None,
) -> None:
    """Write the start of a stage of your own.

    It is one file, NAME.py, in the working directory, which `check --stage ./NAME.py` accepts as
    it is. An existing file is never written over.
    """
    from cnnlib.files import check_writable

    check_name(name)
    path = Path(f"{name}.py")
    if engine is None:
        text, what = start_from(name, base), f"stage {base} with an operator of its own"
    else:
        text, what = loop_in(name, engine), f"a training loop in {engine}"
    check_writable(path)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        from cnnlib.errors import ConfigError

        raise ConfigError(f"{path} exists already; choose another name, or remove it") from None
    typer.echo(f"./{path}: {what}\ncheck it: cnnlib check --stage ./{path}")


def check_name(name: str) -> None:
    """ConfigError for a name that a Python file or a stage cannot have, or that is taken."""
    import keyword
    import re

    from cnnlib import patterns
    from cnnlib.errors import ConfigError
    from cnnlib.stages import is_shipped

    is_long = len(name) > patterns.LONGEST_NAME
    if is_long or not name.isidentifier() or not re.fullmatch(patterns.NAME, name):
        raise ConfigError(
            f"{name!r} cannot be the name of a stage: it must be made of English letters, digits "
            f"and '_', begin with a letter and have at most {patterns.LONGEST_NAME} characters"
        )
    if keyword.iskeyword(name):
        raise ConfigError(f"{name!r} cannot be the name of a stage: it is a word of Python")
    if is_shipped(name):
        raise ConfigError(f"{name!r} is the name of a stage of cnnlib; choose another")


def start_from(name: str, base: str) -> str:
    """The text of a stage that replaces the operator of `base` for fully connected layers.

    Of a stage with plans it is that of the first plan.
    """
    from cnnlib.engine.plans import records_of
    from cnnlib.errors import ConfigError
    from cnnlib.layers import Dense
    from cnnlib.stages import LADDER

    stages = {stage.name: stage for stage in LADDER}
    if base not in stages:
        known = ", ".join(stages)
        raise ConfigError(f"unknown stage {base!r} in --from; known: {known}")
    stage = next(iter(records_of(stages[base]).values()))
    module = importlib.import_module(f"cnnlib.stages.{base}")
    keys = [key for key in stage.operators if Dense in key]
    operator = stage.operators[Dense,]
    kinds = sorted({kind.__name__ for key in keys for kind in key})
    texts = [", ".join(kind.__name__ for kind in key) + "," * (len(key) == 1) for key in keys]
    return START.substitute(
        name=name,
        base=base,
        record=next(name for name, value in vars(module).items() if value is stage),
        kinds=", ".join(kinds),
        module=operator.__module__,
        operator=operator.__name__,
        entries="\n".join(f"        ({text}): MyDense," for text in texts),
        kernels=about_kernels(name, getattr(operator, "file", "")),
    )


def about_kernels(name: str, file: str) -> str:
    """How kernels of one's own are written, for operators with a file of them."""
    if not file:
        return ""
    own = f"{name}.cuh"
    return KERNELS.format(file=file, own=own, macro=f"{name.upper()}_KERNELS").rstrip()


def loop_in(name: str, library: str) -> str:
    """The text of a stage with a training loop in a library."""
    from cnnlib.commands import starts
    from cnnlib.errors import ConfigError

    if library not in ENGINES:
        raise ConfigError(f"unknown library {library!r} in --engine; known: {', '.join(ENGINES)}")
    folder = Path(inspect.getfile(starts)).parent
    return (folder / f"{library}_loop.py").read_text(encoding="utf-8").replace("NAME", name)
