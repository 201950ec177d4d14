"""Weights as a .safetensors file: one tensor for each parameter, and the network as metadata.

The tensors have the names and shapes that PyTorch gives them (`Network.state_dict`), so that other
programs can read them without this library.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnnlib.errors import DataError
from cnnlib.exchange.found import Found, described
from cnnlib.exchange.weights import Weights, describe, read_description
from cnnlib.layers import Array

if TYPE_CHECKING:
    from safetensors import safe_open

KEY = "cnnlib"
"""The metadata's only key: safetensors writes several in an order that changes."""

KINDS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
"""Types of elements that can be read; numbers other than floats only beside the parameters."""


def write(path: Path, weights: Weights) -> None:
    """Write the file; the same weights give the same bytes."""
    from safetensors.numpy import save

    tensors = {
        name: np.ascontiguousarray(array, np.float32) for name, array in weights.tensors.items()
    }
    path.write_bytes(save(tensors, {KEY: describe(weights).model_dump_json()}))


def read(path: Path) -> Found:
    """What is in the file: tensors alone if another program wrote it.

    Raises DataError naming the file, and the tensor with its shapes, when it is missing or damaged.
    """
    what = f"weights file {path}"
    arrays, metadata = _content(path, what)
    if KEY not in metadata:
        return Found(what, arrays, ordered=False)
    kept = read_description(metadata[KEY], what)
    return described(what, arrays, kept, kept.built(what))


def _content(path: Path, what: str) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors and the metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb"):  # safetensors' own messages name neither the file nor the reason
            pass
        with safe_open(path, framework="np") as file:
            # A loop over `file` is not possible: it has keys, but is no mapping.
            names = list(file.keys())
            return {name: _array(path, file, name) for name in names}, file.metadata() or {}
    except OSError as error:
        raise DataError(f"cannot read {what}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, TypeError, MemoryError) as error:
        raise DataError(f"{what} is damaged: {error or type(error).__name__}") from None


def _array(path: Path, file: "safe_open", name: str) -> Array:
    """One tensor; numpy has no bfloat16, the upper half of a float32, so that zeros are added."""
    kind = file.get_slice(name).get_dtype()
    if kind == "BF16":
        from safetensors import deserialize

        raw = dict(deserialize(path.read_bytes()))[name]
        halves = np.frombuffer(raw["data"], "<u2").astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(raw["shape"])
    if kind not in KINDS:
        raise ValueError(f"tensor {name} has elements of type {kind}; known: {', '.join(KINDS)}")
    array: Array = file.get_tensor(name)
    return array
