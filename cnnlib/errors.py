"""The errors a user can cause or mend: one clear line each, exit code 2 on the command line."""


class UserError(Exception):
    """Bad input or a missing thing; the message names the thing, the place and the choices."""


class ConfigError(UserError):
    """The configuration asks for something that cannot be; the message is one line."""

    def __init__(self, message: str) -> None:
        # a key or a name that is quoted may hold anything, ends of lines too
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class BrokenStage(ConfigError):
    """A stage is asked for whose module or record is wrong; the message names both."""


class DataError(UserError):
    """A data file is missing, damaged or not what it claims to be."""


class DeviceError(UserError):
    """The machine lacks something a device needs: driver, toolkit, PyCUDA or a compiler."""


class WorkerDied(DeviceError):
    """A process that a stage computes in has ended before its work was done."""


class DoesNotFit(DeviceError):
    """The device has not enough memory for what was asked."""


class Unsupported(UserError):
    """A stage has no operator for a layer, or its operator cannot take these sizes."""
