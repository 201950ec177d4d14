"""A state_dict of PyTorch in a file of torch.save: the weights alone."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from cnnlib.errors import DataError, MissingLibrary
from cnnlib.exchange.found import Found
from cnnlib.exchange.weights import Weights
from cnnlib.torch_modules.build import arrays_of, state_dict, torch_module

SAFE = (2, 6)
"""The first version whose torch.load executes nothing of a file (CVE-2025-32434)."""
NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which checkpoints of training programs keep a state_dict."""


def write(path: Path, weights: Weights) -> None:
    """Write the state_dict of `Network.to_torch`; MissingLibrary without PyTorch."""
    torch = torch_module("a file of torch.save")
    torch.save(state_dict(weights.tensors), path)


def read(path: Path) -> Found:
    """The tensors of a state_dict; nothing in the file is ever executed.

    A checkpoint is read that has it under one of the keys NESTED. Raises DataError naming the file
    when it is missing, damaged or holds anything but tensors, MissingLibrary without PyTorch.
    """
    what = f"weights file {path}"
    torch = torch_module(what)
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < SAFE:
        raise MissingLibrary(
            f"PyTorch {torch.__version__} cannot read {path} safely; versions from 2.6 on can"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"cannot read {what}: {error.strerror or error}") from None
    except Exception as error:
        # PyTorch raises errors of many kinds for damaged files, with advice to read them unsafely.
        if type(error).__name__ == "UnpicklingError" and "GLOBAL" in str(error):
            raise DataError(
                f"{what} holds more than tensors, which could run code when it is read: save the "
                "module's state_dict() instead"
            ) from None
        raise DataError(f"{what} is damaged, or no state_dict in a file of torch.save") from None
    if isinstance(state, Mapping):
        state = next((state[key] for key in NESTED if isinstance(state.get(key), Mapping)), state)
    try:
        return Found(what, arrays_of(state))
    except TypeError as error:
        raise DataError(f"{what} is no state_dict: {error}") from None
