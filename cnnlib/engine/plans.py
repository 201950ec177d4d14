"""A stage with several plans: ways to train that each serve some networks, some of them both.

Each plan is a record of its own with the stage's name, which an engine serves as it would serve a
stage. The first plan that takes a network trains it; where several do, a GPU may measure which is
the fastest.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np

from cnnlib.device import Device, Limits
from cnnlib.device.cache import content_key, included_files
from cnnlib.engine.autotune import (
    TRIALS,
    Unsteady,
    fastest,
    kept_times,
    measured_steadily,
    not_repeated,
    steady,
    steps_within,
)
from cnnlib.engine.device_engine import DeviceEngine
from cnnlib.engine.shuffle import Shuffle
from cnnlib.engine.stage import Options, Setup, Stage, name_of, options_of, plan
from cnnlib.engine.step_plan import StepPlan
from cnnlib.errors import DoesNotFit, Unsupported

TRIED_IMAGES = 32768
"""Images of a timed training, about half an epoch of most data sets."""
MIN_STEPS, MAX_STEPS = 16, 512
"""Steps of a timed training: so many that what an epoch costs beside its steps hardly counts, and
not more than some 30 ms take at the smallest batches.
"""


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
    def sources_on(cls, stage: Stage, setup: Setup, limits: Limits) -> list[str]:
        chosen = [cls.record_on(stage, setup, limits)]
        if options_of(stage, Plans).compared and setup.tune:
            found = answers(stage, setup, limits).values()
            chosen = [answer.stage for answer in found if not answer.declined]
        sources = [_device_engine(plan).sources_on(plan, setup, limits) for plan in chosen]
        return list(dict.fromkeys(itertools.chain.from_iterable(sources)))

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
    of a step by each, or why there are none. Raises Unsupported with all reasons where no plan
    takes the network here.
    """
    options, found = options_of(stage, Plans), answers(stage, setup, device)
    declined = {name: answer.declined for name, answer in found.items() if answer.declined}
    names = [name for name in found if name not in declined]
    if not names:
        raise _no_plan(stage, setup, declined)
    chosen, decisions = names[0], dict[str, object]()
    if options.compared and setup.tune and len(names) > 1:
        chosen, decisions = _compared({name: found[name].stage for name in names}, setup, device)
    record = found[chosen].stage
    engine = _device_engine(record)(record, setup, device)
    engine.decisions = {"chosen_plan": chosen, "plans_declined": declined, **decisions}
    return engine


def _compared(
    plans: Mapping[str, Stage], setup: Setup, device: Device
) -> tuple[str, dict[str, object]]:
    """The name of the fastest plan, and what is to be recorded of the comparison.

    The times come from the cache if they are there. Otherwise all code is compiled, and what the
    engines choose is chosen, before anything is timed.
    """
    sources = [plan.engine.source_on(plan, setup, device) for plan in plans.values()]
    options = [repr(plan.options) for plan in plans.values()]  # sources do not hold all of them
    steps = steps_within(setup.batch_size, TRIED_IMAGES, MIN_STEPS, MAX_STEPS)
    parts = [device.name, str(device.multiprocessors), str(setup.batch_size), str(steps)]
    key = content_key(["plans", *parts, *options, *sources], included_files(*sources))
    seconds = kept_times(key, len(plans))
    if seconds is None:
        try:
            with _Contest(plans.values(), setup, device, steps) as contest:
                seconds = contest.measured(key)
        except Unsteady:
            return next(iter(plans)), {"plans_not_compared": not_repeated(len(plans))}
    known = (None if math.isnan(time) else time for time in seconds)
    return list(plans)[fastest(seconds)], {"plan_seconds": dict(zip(plans, known, strict=True))}


class _Contest:
    """Engines of several plans, each with the same random images loaded, that are timed in turn.

    One that does not fit beside the others takes no part.
    """

    def __init__(self, plans: Iterable[Stage], setup: Setup, device: Device, steps: int) -> None:
        self._steps, self._images = steps, steps * setup.batch_size
        network, random = setup.network, np.random.default_rng(0)
        shape = self._images, *network.input_shape
        images = random.integers(0, 256, shape, dtype=np.uint8)
        labels = random.integers(0, network.classes, self._images, dtype=np.uint8)
        self._engines: list[DeviceEngine[Any] | None] = []
        with contextlib.ExitStack() as stack:
            for plan in plans:
                try:
                    engine = stack.enter_context(_device_engine(plan)(plan, setup, device))
                    engine.load(images, labels)
                    engine.parameters = network.initial_parameters(1)
                except (Unsupported, DoesNotFit):
                    self._engines.append(None)
                else:
                    self._engines.append(engine)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        self._engines.clear()

    def measured(self, key: str) -> list[float]:
        """Seconds of a step by each plan, which are kept; nan for one that takes no part.

        Raises Unsteady where they do not repeat.
        """
        return measured_steadily(key, len(self._engines), self.seconds)

    def seconds(self) -> list[float]:
        """Seconds of a step by each plan, by the device's events. Raises Unsteady."""
        rounds = [[self._trial(e, number) for e in self._engines] for number in range(1 + TRIALS)]
        return [
            math.nan if engine is None else steady([times[i] for times in rounds[1:]])
            for i, engine in enumerate(self._engines)
        ]

    def _trial(self, engine: DeviceEngine[Any] | None, number: int) -> float:
        if engine is None:
            return math.nan
        # at a rate of 0 no number grows
        engine.train_epoch(Shuffle(self._images, 0, number), np.zeros(self._steps))
        return engine.event_seconds / self._steps
