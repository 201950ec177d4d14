"""Messages between the judge and a worker: a line of JSON and raw arrays, nothing that runs code.

A message is the length of its head (8 bytes, little-endian), the head as JSON, and the bytes of
the arrays that the head describes. Pickle is not used, since loading it can call anything, and what
comes from a worker is not trusted.
"""

import json
import math
import socket
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

AnyArray = NDArray[np.generic]
Head = dict[str, object]

MOST_HEAD = 1 << 24
"""Bytes that a head may have."""
KINDS = "biuf"
"""Kinds of numbers that arrays may hold: truth values, integers and floating point numbers."""


class Message(NamedTuple):
    """What was sent: values that JSON can hold, and arrays."""

    head: Head
    arrays: list[AnyArray]


def send(to: socket.socket, head: Head, arrays: Sequence[AnyArray] = ()) -> None:
    """Send one message; `head` must not use the key `arrays`."""
    whole = [np.ascontiguousarray(array) for array in arrays]
    described = [[array.dtype.str, list(np.shape(array))] for array in arrays]
    text = json.dumps({**head, "arrays": described}).encode()
    to.sendall(len(text).to_bytes(8, "little") + text)
    for array in whole:
        if array.size:
            to.sendall(array.reshape(-1).view(np.uint8).data)


def receive(source: socket.socket) -> Message:
    """The next message. Raises EOFError when the other side has gone, ValueError for nonsense."""
    length = int.from_bytes(_exactly(source, 8), "little")
    if length > MOST_HEAD:
        raise ValueError(f"a message of {length} bytes")
    head = json.loads(_exactly(source, length))
    arrays = []
    for name, shape in head.pop("arrays"):
        dtype = np.dtype(name)
        if dtype.kind not in KINDS:
            raise ValueError(f"an array of {dtype}")
        data = _exactly(source, math.prod(shape) * dtype.itemsize)
        arrays.append(np.frombuffer(data, dtype).reshape(shape))
    return Message(head, arrays)


def _exactly(source: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, have = memoryview(data), 0
    while have < count:
        got = source.recv_into(view[have:])
        if not got:
            raise EOFError
        have += got
    return data
