"""What a user may ask of a stage that has several ways to train a step, before any of them runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepPlan:
    """One way of a stage to train a step of a network on a device."""

    name: str
    facts: Mapping[str, object] = field(default_factory=dict)
    """Its sizes, by the names that run.json has for them: values that JSON can hold."""
    declined: str = ""
    """Why the network cannot be trained so on this device; "" where it can."""
    operators: tuple[str, ...] = ()
    """`layers: operator` as Engine.served has them, where a stage's plans have operators of their
    own.
    """
