"""Integer arithmetic that the whole package shares."""


def ceil_div(number: int, divisor: int) -> int:
    """`number` / `divisor`, rounded up; both integers, the divisor positive."""
    return -(-number // divisor)
