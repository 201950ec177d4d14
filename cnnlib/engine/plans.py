"""A stage with several plans: ways to train that each serve some networks, some of them both.

Each plan is a record of its own with the stage's name, which an engine serves as it would serve a
stage. The first plan that takes a network trains it; where several do, a GPU may measure which is
the fastest.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np

from cnnlib.device import Device, Limits
from cnnlib.device.cache import content_key, included_files
from cnnlib.engine.autotune import Unsteady, fastest, measured_once, steady
from cnnlib.engine.device_engine import DeviceEngine
from cnnlib.engine.stage import Options, Setup, Stage, name_of, options_of, plan
from cnnlib.engine.step_plan import StepPlan
from cnnlib.errors import DoesNotFit, Unsupported

TRIED_STEPS = 64
"""Steps of a timed training: enough that what an epoch costs beside its steps hardly counts."""
TRIALS = 3
"""Timed trainings of a plan, after one warm-up; the minimum counts, unless they disagree."""
ATTEMPTS = 3
"""Rounds of timing before the first plan is taken: all times of a round must repeat."""


@dataclass(frozen=True)
class Plans(Options):
    """The plans of a stage, by name; the earlier ones are preferred."""

    plans: Mapping[str, Stage] = field(default_factory=dict)
    compared: bool = False
    """Whether it is measured which plan is the fastest, where several take a network and an engine
    may measure (Setup.tune, which is never set where kernels are emulated).
    """


class Answer(NamedTuple):
    """What a plan says to a network."""

    stage: Stage
    """The plan's own record."""
    operators: Sequence[object]
    """Its operators, as Engine.operators_on gives them; empty where it declines."""
    declined: str
    """Why it cannot take the network; "" where it can."""


class EngineOfPlans(DeviceEngine[Any]):
    """Makes the engine of one of a stage's plans; no engine is an instance of this class itself.

    So everything that makes an engine, or asks what one would do, goes through the stage's record
    whether it has plans or not.
    """

    options_class = Plans

    def __new__(cls, stage: Stage, setup: Setup, device: Device) -> Self:
        made: DeviceEngine[Any] = engine_of_a_plan(stage, setup, device)
        return made  # type: ignore[return-value]

    @classmethod
    def operators_on(cls, stage: Stage, setup: Setup, limits: Limits | None) -> Sequence[object]:
        return _first(stage, setup, limits).operators

    @classmethod
    def record_on(cls, stage: Stage, setup: Setup, limits: Limits | None) -> Stage:
        return _first(stage, setup, limits).stage

    @classmethod
    def plans_on(cls, stage: Stage, setup: Setup, limits: Limits) -> Sequence[StepPlan]:
        """What each plan says, with the sizes of those whose engine has some to say."""
        found = []
        for name, answer in answers(stage, setup, limits).items():
            said = answer.stage.engine.plans_on(answer.stage, setup, limits)
            facts = next((each.facts for each in said if not each.declined), {})
            declined = answer.declined or " ".join(each.declined for each in said)
            parts = () if answer.declined else plan(answer.stage, setup.network)
            pairs = zip(parts, answer.operators, strict=True)
            served = tuple(f"{part.name}: {name_of(operator)}" for part, operator in pairs)
            found.append(StepPlan(name, facts, declined, served))
        return found

    @classmethod
    def source_on(cls, stage: Stage, setup: Setup, limits: Limits) -> str:
        chosen = cls.record_on(stage, setup, limits)
        return chosen.engine.source_on(chosen, setup, limits)

    @classmethod
    def kernels_on(cls, stage: Stage, setup: Setup, limits: Limits) -> list[str]:
        chosen = cls.record_on(stage, setup, limits)
        return _device_engine(chosen).kernels_on(chosen, setup, limits)


EngineOfPlans.__abstractmethods__ = frozenset()
"""None is lacking where none is ever called."""


def records_of(stage: Stage) -> Mapping[str, Stage]:
    """The records of the stage's plans by name; a stage without plans has one, called "".

    They have the stage's own name, also where it was made from another stage by `replace`.
    """
    if not issubclass(stage.engine, EngineOfPlans):
        return {"": stage}
    return {
        name: plan if plan.name == stage.name else replace(plan, name=stage.name)
        for name, plan in options_of(stage, Plans).plans.items()
    }


def answers(stage: Stage, setup: Setup, limits: Limits | None) -> dict[str, Answer]:
    """What each of the records of the stage says to the network."""
    return {name: _answer(plan, setup, limits) for name, plan in records_of(stage).items()}


def _answer(plan: Stage, setup: Setup, limits: Limits | None) -> Answer:
    try:
        return Answer(plan, plan.engine.operators_on(plan, setup, limits), "")
    except Unsupported as error:
        return Answer(plan, (), str(error))


def _first(stage: Stage, setup: Setup, limits: Limits | None) -> Answer:
    """The first plan's answer that takes the network. Raises Unsupported with all reasons."""
    found = answers(stage, setup, limits)
    for answer in found.values():
        if not answer.declined:
            return answer
    raise _no_plan(stage, setup, {name: answer.declined for name, answer in found.items()})


def _no_plan(stage: Stage, setup: Setup, reasons: Mapping[str, str]) -> Unsupported:
    said = "; ".join(f"plan {name}: {reason}" for name, reason in reasons.items())
    return Unsupported(
        f"stage '{stage.name}' has no plan for network '{setup.network.name}': {said}"
    )


def _device_engine(plan: Stage) -> type[DeviceEngine[Any]]:
    """The engine of a plan. Raises TypeError for one that does not compute on a device."""
    if not issubclass(plan.engine, DeviceEngine):
        raise TypeError(f"engine {plan.engine.__name__} of a plan of stage '{plan.name}'")
    return plan.engine


def engine_of_a_plan(stage: Stage, setup: Setup, device: Device) -> DeviceEngine[Any]:
    """The engine of the plan that is preferred or, where plans are compared, the fastest.

    Its `decisions` name the plan, the others' reasons and, where they were compared, the seconds
    of a step. Raises Unsupported with all reasons where no plan takes the network here.
    """
    options, found = options_of(stage, Plans), answers(stage, setup, device)
    declined = {name: answer.declined for name, answer in found.items() if answer.declined}
    names = [name for name in found if name not in declined]
    if not names:
        raise _no_plan(stage, setup, declined)
    chosen, decisions = names[0], {}
    if options.compared and setup.tune and len(names) > 1:
        seconds = _measured([found[name].stage for name in names], setup, device)
        if seconds:
            chosen = names[fastest(seconds)]
            known = (None if math.isnan(time) else time for time in seconds)
            decisions = {"plan_seconds": dict(zip(names, known, strict=True))}
    record = found[chosen].stage
    engine = _device_engine(record)(record, setup, device)
    engine.decisions = {"chosen_plan": chosen, "plans_declined": declined, **decisions}
    return engine


def _measured(plans: Sequence[Stage], setup: Setup, device: Device) -> list[float]:
    """Seconds of a step by each of the plans, nan for one that cannot train here; from the cache
    if they are there. Empty where others on the device keep them from repeating.
    """
    sources = [plan.engine.source_on(plan, setup, device) for plan in plans]
    parts = [device.name, str(device.multiprocessors), str(setup.batch_size), str(TRIED_STEPS)]
    key = content_key(["plans", *parts, *sources], included_files(*sources))
    for _ in range(ATTEMPTS):
        with contextlib.suppress(Unsteady):
            return measured_once(
                key, len(plans), lambda: [_step_seconds(plan, setup, device) for plan in plans]
            )
    return []


def _step_seconds(plan: Stage, setup: Setup, device: Device) -> float:
    """Seconds of a step by this plan on random images, by the device's events. Raises Unsteady."""
    network, random = setup.network, np.random.default_rng(0)
    count = TRIED_STEPS * setup.batch_size
    images = random.integers(0, 256, (count, *network.input_shape), dtype=np.uint8)
    try:
        with _device_engine(plan)(plan, setup, device) as engine:
            engine.load(images, random.integers(0, network.classes, count, dtype=np.uint8))
            engine.parameters = network.initial_parameters(1)
            times = []
            for _ in range(1 + TRIALS):
                # at a rate of 0 no number grows
                engine.train(np.arange(count), np.zeros(TRIED_STEPS))
                times.append(engine.event_seconds / TRIED_STEPS)
    except (Unsupported, DoesNotFit):
        return math.nan
    return steady(times[1:])
