"""How times and numbers are written, the same in commands, tables and figures."""

import math


def duration(seconds: float) -> str:
    """Three digits and a unit that suits: 1.85 ms, 3.72 s, 12.4 min, 6.95 h."""
    if not math.isfinite(seconds):
        return "-"
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{digits(seconds / unit)} {name}"
    for fraction, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= fraction:
            return f"{digits(seconds / fraction)} {name}"
    return f"{digits(seconds * 1e9)} ns"


def times(factor: float) -> str:
    """A ratio: 0.85x, 9.2x, 141x, 12,300x."""
    if factor == 1:
        return "1×"
    return f"{digits(factor, 2 if factor < 10 else 3)}×"


def digits(value: float, count: int = 3) -> str:
    """`value` to `count` digits, without an exponent; thousands set apart."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    # of the rounded value: 99.97 to three digits is 100 and not 100.0
    decimals = count - 1 - int(f"{value:.{count - 1}e}".partition("e")[2])
    return f"{round(value, decimals):,.{max(decimals, 0)}f}"
