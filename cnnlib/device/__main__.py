"""`env $(python -m cnnlib.device) python ...` builds emulated kernels with sanitizers."""

import sys

from cnnlib.device.compiler import sanitizer_environment
from cnnlib.errors import UserError

try:
    print(" ".join(f"{name}={value}" for name, value in sanitizer_environment().items()))
except UserError as error:
    sys.exit(str(error))
