"""How the programs that rules call report a user's mistake: in one line, with exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cnnlib.errors import UserError


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a UserError as one line without a traceback and exit with code 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
