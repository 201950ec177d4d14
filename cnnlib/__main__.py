"""The command line: each step of the experiment as a command.

It is called by `python -m cnnlib`, or as `cnnlib` where the package is installed.

Exit codes: 0 for success; 1 when a check failed or a training diverged; 2 for bad input, with one
line that describes it; 130, 138 and 143 after SIGINT, SIGUSR1 and SIGTERM.
"""

import signal
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

import cnnlib
from cnnlib.commands import (
    compare,
    compile_kernels,
    convert,
    data,
    evaluate,
    examine,
    exercise,
    judge,
    lab_report,
    measuring,
    new_stage,
    plan,
    predict,
    probe,
    show,
    submit,
    timeline,
    training,
)
from cnnlib.errors import UserError, one_line
from cnnlib.system.interrupts import SIGNALS

app = typer.Typer(
    name="cnnlib", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cnnlib {cnnlib.__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Train one convolutional network by several stages, from numpy to CUDA, and time them."""


for command in (
    data.download,
    data.prepare,
    data.checksum,
    training.train,
    evaluate.evaluate,
    predict.predict,
    convert.convert,
    measuring.measure,
    measuring.sweep,
    measuring.transfers,
    measuring.race,
    probe.probe,
    examine.cpu_profile,
    examine.profile,
    timeline.timeline,
    examine.features,
    examine.pictures,
    measuring.check,
    judge.judge,
    lab_report.lab_report,
    compare.compare,
    submit.submit,
    new_stage.new_stage,
    data.combine,
    show.ladder,
    show.stages,
    plan.plan,
    compile_kernels.compile_kernels,
    show.show_source,
):
    app.command()(command)
app.add_typer(exercise.app, name="exercise")
app.command("functions", hidden=True)(examine.cpu_profile)  # its name in earlier versions


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; user errors become one line without a traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    for number in SIGNALS:
        signal.signal(number, _leave)
    warnings.showwarning = _say_warning
    # Overflow precedes a loss that is not finite, and the loss itself is checked.
    warnings.simplefilter("ignore", RuntimeWarning)
    try:
        code = app(given or ["--help"], prog_name=_name(), standalone_mode=False)
    except (UserError, MemoryError) as error:
        return _fail(one_line(error))
    except typer.TyperException as error:
        return _fail(error.format_message())
    except SyntaxError as error:  # in the module of a stage that serves as a reference
        return _fail(f"{error.filename}, line {error.lineno}: {error.msg}")
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(one_line(error))
    if code == 130:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _name() -> str:
    """What this program was called as."""
    return "cnnlib" if Path(sys.argv[0]).stem == "cnnlib" else "python -m cnnlib"


def _fail(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 2


def _leave(number: int, frame: FrameType | None) -> None:
    # An exception lets temporary files be removed on the way out.
    raise SystemExit(128 + number)


def _say_warning(message: Warning | str, *where: object, **more: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
