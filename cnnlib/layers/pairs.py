"""Settings for both directions of a map: one whole number for both, or [rows, columns]."""

from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

Pair = tuple[int, int]
"""(rows, columns)."""

_MOST = 2**31


def _both(least: int, value: Any) -> Pair:
    numbers = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(numbers) != 2 or not all(type(number) is int for number in numbers):
        raise ValueError("must be a whole number, or [rows, columns]")
    if min(numbers) < least:
        bound = f"greater than {least - 1}" if least else "0 or greater"
        raise ValueError(f"must be {bound}")
    if max(numbers) >= _MOST:
        raise ValueError(f"must be less than {_MOST}")
    return numbers[0], numbers[1]


def _positive(value: Any) -> Pair:
    return _both(1, value)


def _not_negative(value: Any) -> Pair:
    return _both(0, value)


def _short(pair: Pair) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)


Size = Annotated[
    Pair, BeforeValidator(_positive, json_schema_input_type=int | Pair), PlainSerializer(_short)
]
"""A pair of numbers from 1 on, for windows and their distances."""
Padding = Annotated[
    Pair, BeforeValidator(_not_negative, json_schema_input_type=int | Pair), PlainSerializer(_short)
]
"""A pair of numbers from 0 on: rows added above and below a map, columns left and right."""


def by(pair: Pair) -> str:
    """The pair as people write a size: 3x5."""
    return f"{pair[0]}x{pair[1]}"
