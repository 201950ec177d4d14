"""Random numbers that are a function of a counter and a key, and so the same in every stage.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11.
kernels/philox.cuh is the same function on a GPU.
"""

from collections.abc import Sequence

import numpy as np

from cnnlib.layers.base import Array

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)


def philox(counter: Sequence[Array | int], key: tuple[int, int]) -> Array:
    """Four random words for each counter, as (4, *shape) uint32.

    `counter` has four words, arrays of numbers below 2^32 or one number for all, which are
    broadcast to the shape of the counters; `key` has two. Words that many counters have in common
    are better given broadcast: the first rounds then compute with few numbers.
    """
    a, b, c, d = (np.asarray(word, np.uint64) for word in counter)
    for round_ in range(ROUNDS):
        steps = zip(key, KEY_STEPS, strict=True)
        low, high = (np.uint64((word + round_ * step) % 2**32) for word, step in steps)
        first, second = np.uint64(MULTIPLIERS[0]) * a, np.uint64(MULTIPLIERS[1]) * c
        a, c = (second >> _HIGH) ^ (b ^ low), (first >> _HIGH) ^ (d ^ high)
        b, d = second & _WORD, first & _WORD
    return np.stack(np.broadcast_arrays(a, b, c, d)).astype(np.uint32)
