"""What a check can conclude besides that a stage is right: that it is wrong, or nothing at all."""

from cnnlib.engine import Engine
from cnnlib.errors import UserError


class ValidationFailed(UserError):
    """A stage computes something else than the reference."""


class Unjudged(UserError):
    """Right and wrong stages look alike here; the message says what to change."""


def require(engine: Engine, what: str, error: float, bound: float) -> float:
    """`error` as a share of `bound`; raises ValidationFailed where it exceeds the bound."""
    if not error <= bound:  # so that NaN fails
        raise failure(engine, f"{what} is off by {error:.3g}, allowed {bound:.3g}")
    return float(error / bound) if bound else 0.0


def failure(engine: Engine, what: str) -> ValidationFailed:
    """The exception that names stage and network; `what` is the sentence after the colon."""
    return ValidationFailed(
        f"stage '{engine.stage.name}' fails validation on network '{engine.network.name}': {what}"
    )


def unjudged(engine: Engine, why: str, instead: str) -> Unjudged:
    """The exception that names the network; `instead` is what to change the network to."""
    name = engine.network.name
    return Unjudged(
        f"network '{name}' cannot be judged: {why}; change networks.{name} ({instead}) or "
        f"training.seed"
    )
