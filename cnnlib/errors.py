"""The errors that a user can cause or fix: one clear line each, exit code 2 on the command line.

All are UserErrors. Those that a caller of the library may expect by another name are that too: a
wrong argument is a ValueError, a loss that is no longer finite an ArithmeticError.
"""


class UserError(Exception):
    """Bad input or something missing; the message names it, its location and the choices."""


class OneLineError(UserError):
    """A UserError whose message is a single line, even if it quotes line breaks."""

    def __init__(self, message: str) -> None:
        # A key or a file name may contain any character.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class ConfigError(OneLineError, ValueError):
    """The configuration, or an argument of the library, asks for something impossible."""


class NotFitted(ConfigError):
    """A trainer is asked for what only `fit` gives it: how to normalise images."""


class Diverged(OneLineError, ArithmeticError):
    """The loss of a training is no longer finite."""


class BrokenStage(ConfigError):
    """A requested stage has a broken module or record; the message names both."""


class DataError(OneLineError):
    """A data file is missing, damaged or of another kind than expected."""


class DeviceError(UserError):
    """The machine lacks something a device needs: driver, toolkit, PyCUDA or a compiler."""


class WorkerDied(DeviceError):
    """A process in which a stage computes has ended before it finished its work."""


class DoesNotFit(DeviceError):
    """The device does not have enough memory for the request."""


class MissingLibrary(UserError):
    """A library is not installed that only some of the functions need; the message says how."""


class Unsupported(UserError):
    """A stage has no operator for a layer, or its operator cannot take these sizes."""


def one_line(error: BaseException) -> str:
    """The line that the command line prints for an exception that is no bug."""
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
