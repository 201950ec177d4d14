"""Masks of dropout in a peer library's arithmetic: those of cnnlib.layers.dropout, bit by bit.

A library's own dropout draws other numbers, and its training could not be compared with anything.
"""

from collections.abc import Callable
from typing import TypeVar

from cnnlib.layers import philox

T = TypeVar("T")

Multiply = Callable[[int, T], tuple[T, T]]
"""(number, words) -> the high and the low 32 bits of their products."""


def random_words(
    multiply: Multiply[T],
    exclusive_or: Callable[[T, T | int], T],
    counter: tuple[T, T, T, T],
    seed: int,
) -> tuple[T, T, T, T]:
    """The four words of Philox4x32-10 for each counter, by a library's arithmetic."""
    a, b, c, d = counter
    key = [seed % 2**32, (seed >> 32) % 2**32]
    for _ in range(philox.ROUNDS):
        high, low = multiply(philox.MULTIPLIERS[0], a)
        other_high, other_low = multiply(philox.MULTIPLIERS[1], c)
        a, b = exclusive_or(exclusive_or(other_high, b), key[0]), other_low
        c, d = exclusive_or(exclusive_or(high, d), key[1]), low
        key = [(word + step) % 2**32 for word, step in zip(key, philox.KEY_STEPS, strict=True)]
    return a, b, c, d
