"""The command line, `python -m cnnlib`: every step of the experiment by itself.

Exit codes: 0 done; 1 a check failed or a training diverged; 2 bad input, said in one line;
130, 138 and 143 interrupted (by SIGINT, SIGUSR1, SIGTERM).
"""

import signal
import sys
import warnings
from types import FrameType
from typing import Any

import typer

from cnnlib.commands import data, examine, measuring, probe, show, training
from cnnlib.errors import UserError
from cnnlib.system.interrupts import SIGNALS

app = typer.Typer(
    name="cnnlib", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.callback()
def about() -> None:
    """Train one convolutional network through several stages, from numpy to CUDA, and time it."""


for command in (
    data.download,
    data.prepare,
    training.train,
    training.predict,
    measuring.measure,
    measuring.sweep,
    measuring.transfers,
    measuring.race,
    probe.probe,
    examine.cpu_profile,
    examine.features,
    examine.pictures,
    measuring.check,
    data.combine,
    show.ladder,
    show.stages,
    show.plan,
):
    app.command()(command)
# How the table is called, and how the command was called in earlier versions.
for name in ("cpu_profile", "functions"):
    app.command(name, hidden=True)(examine.cpu_profile)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code. What a user can mend is one line on stderr, no traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    for number in SIGNALS:
        signal.signal(number, _leave)
    warnings.showwarning = _say_warning
    # Overflow on the way to a loss that is not finite; the loss itself is looked at.
    warnings.simplefilter("ignore", RuntimeWarning)
    try:
        code = app(given or ["--help"], prog_name="python -m cnnlib", standalone_mode=False)
    except UserError as error:
        return _fail(error)
    except typer.TyperException as error:
        return _fail(error.format_message())
    except MemoryError as error:
        return _fail(f"out of memory: {error}" if str(error) else "out of memory")
    except SyntaxError as error:  # in a stage that others are compared with
        return _fail(f"{error.filename}, line {error.lineno}: {error.msg}")
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    if code == 130:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _fail(problem: object) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 2


def _leave(number: int, frame: FrameType | None) -> None:
    # By an exception, so that temporary files are removed on the way out.
    raise SystemExit(128 + number)


def _say_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
