"""The errors that a user can cause or fix: one clear line each, exit code 2 on the command line."""


class UserError(Exception):
    """Bad input or a missing thing; the message names the thing, the place and the choices."""


class OneLineError(UserError):
    """A UserError whose message is one line, whatever it quotes."""

    def __init__(self, message: str) -> None:
        # A key or the name of a file may hold anything, ends of lines too.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class ConfigError(OneLineError):
    """The configuration asks for something that cannot be."""


class BrokenStage(ConfigError):
    """The stage that was asked for has a broken module or record; the message names both."""


class DataError(OneLineError):
    """A data file is missing, damaged or not what it claims to be."""


class DeviceError(UserError):
    """The machine lacks something a device needs: driver, toolkit, PyCUDA or a compiler."""


class WorkerDied(DeviceError):
    """A process in which a stage computes has ended before its work was done."""


class DoesNotFit(DeviceError):
    """The device has not enough memory for what was asked."""


class Unsupported(UserError):
    """A stage has no operator for a layer, or its operator cannot take these sizes."""


def one_line(error: BaseException) -> str:
    """The line that the command line prints for an exception that is no bug."""
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
