"""A stage with two plans: which of them trains, and how that is said."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from cnnlib.device import Device
from cnnlib.device.architecture import H100
from cnnlib.engine import Setup, Stage, autotune, plans
from cnnlib.engine.autotune import Unsteady
from cnnlib.engine.gpu import GpuEngine
from cnnlib.engine.plans import EngineOfPlans, Plans, answers, records_of
from cnnlib.errors import DoesNotFit, Unsupported
from cnnlib.network import Network
from cnnlib.stages import gemm_cuda, ring, tuned
from cnnlib.stages._loading import fault
from cnnlib.stages.tuned import engine as plans_of_persistent
from cnnlib.stages.tuned.engine import PersistentEngine
from cnnlib.stages.tuned.plan import PersistentOptions, choose
from cnnlib.validation.parity import validate
from cnnlib.validation.spot_checks import five_steps
from tests.support.engines import on, open_engine, pictures
from tests.support.networks import awkward, build, shipped

PADDED = build(
    "padded_little",
    (2, 8, 6),
    3,
    [
        {"conv": {"maps": 2, "kernel": 1}},
        {"conv": {"maps": 3, "kernel": 3, "padding": 1}},
        {"activation": "relu"},
        {"subsample": 2},
        {"dense": 3},
    ],
)
"""A network that plan persistent declines, for the padding of its second layer."""


def of(*records: tuple[str, Stage], compared: bool = False) -> Stage:
    return replace(tuned.STAGE, options=Plans(dict(records), compared))


BOTH = of(("persistent", tuned.PERSISTENT), ("others", gemm_cuda.STAGE), compared=True)
"""Two plans that take `awkward`, of which the second needs nothing but launches."""


def test_the_first_plan_that_takes_a_network_trains_it(device: Device) -> None:
    with open_engine(tuned.STAGE, awkward(), 4, device) as engine:
        assert type(engine) is PersistentEngine
        assert engine.choices["chosen_plan"] == "persistent"
        assert engine.choices["plans_declined"] == {}
        assert "plan_seconds" not in engine.choices
    if device.capture_problem():
        pytest.skip(device.capture_problem())
    with open_engine(tuned.STAGE, PADDED, 4, device, momentum=0.5) as engine:
        assert type(engine) is tuned.GRAPH.engine
        assert engine.stage.name == "tuned"
        assert engine.choices["chosen_plan"] == "graph"
        assert "windows and strides are not square" not in str(engine.choices)
        assert "it has padding" in engine.choices["plans_declined"]["persistent"]
        assert engine.served == [
            "conv1: GraphConv",
            "conv2+activation1+subsample1: GraphConv",
            "dense1: GraphDense",
        ]
        validate(engine, *pictures(PADDED, 4))
        five_steps(engine, *pictures(PADDED, 12))


@pytest.mark.quick
@on(awkward(), PADDED, shipped("pytorch_examples"))
def test_what_is_asked_is_what_would_be_made(network: Network) -> None:
    setup = Setup(network, 64, 0.1)
    found = answers(tuned.STAGE, setup, H100.limits)
    assert list(found) == ["persistent", "graph"]
    assert not found["graph"].declined
    name = "persistent" if network.name == "awkward" else "graph"
    assert bool(found["persistent"].declined) == (name == "graph")
    chosen, engine = found[name].stage, tuned.STAGE.engine
    assert engine.record_on(tuned.STAGE, setup, H100.limits) is chosen
    assert issubclass(engine, EngineOfPlans)
    assert issubclass(chosen.engine, PersistentEngine if name == "persistent" else GpuEngine)
    for asked in ("source_on", "kernels_on"):
        said = getattr(engine, asked)(tuned.STAGE, setup, H100.limits)
        assert said == getattr(chosen.engine, asked)(chosen, setup, H100.limits)
    operators = engine.operators_on(tuned.STAGE, setup, H100.limits)
    assert [type(o) for o in operators] == [type(o) for o in found[name].operators]


@pytest.mark.quick
def test_a_stage_made_from_one_with_plans_is_what_it_says() -> None:
    mine = replace(tuned.STAGE, name="mine")
    assert {plan.name for plan in records_of(mine).values()} == {"mine"}
    assert list(records_of(tuned.STAGE).values()) == [tuned.PERSISTENT, tuned.GRAPH]
    assert fault(mine) == ""
    # What would be left out is refused: the stage would train by other operators than it names.
    wrong = replace(mine, operators=tuned.PERSISTENT.operators)
    assert "begin with the record of a plan" in fault(wrong)
    assert ".options is " in fault(replace(mine, options=PersistentOptions()))


@pytest.mark.quick
def test_a_stage_without_plans_answers_for_itself() -> None:
    setup = Setup(awkward(), 4, 0.1)
    ((name, answer),) = answers(ring.STAGE, setup, H100.limits).items()
    assert (name, answer.stage, answer.declined) == ("", ring.STAGE, "")
    assert ring.STAGE.engine.record_on(ring.STAGE, setup, H100.limits) is ring.STAGE


def test_where_no_plan_takes_a_network_all_reasons_are_given(device: Device) -> None:
    setup = Setup(PADDED, 4, 0.1)
    small = replace(tuned.PERSISTENT, operators={})
    stage = of(("persistent", tuned.PERSISTENT), ("none", small))
    expected = (
        "stage 'tuned' has no plan for network 'padded_little': plan persistent: stage 'tuned' "
        "cannot take conv2+activation1+subsample1 of network 'padded_little': it has padding, "
        "which only a network's first layer may have; plan none: stage 'tuned' has no operator for "
        "conv1 of network 'padded_little'; it knows: nothing"
    )
    for ask in (stage.engine, stage.engine.operators_on, stage.engine.source_on):
        with pytest.raises(Unsupported) as caught:
            ask(stage, setup, device)
        assert str(caught.value) == expected


def test_a_machine_that_cannot_capture_has_the_other_plan_or_a_reason(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(device), "capture_problem", lambda self: "no cuda-bindings")
    with open_engine(tuned.STAGE, awkward(), 4, device) as engine:
        assert engine.choices["chosen_plan"] == "persistent"
    setup = Setup(PADDED, 4, 0.1)
    for ask in (tuned.STAGE.engine, tuned.STAGE.engine.operators_on):
        # so that a trainer that may choose its stage takes the next one
        with pytest.raises(Unsupported, match=r"plan graph: .* as CUDA graphs: no cuda-bindings$"):
            ask(tuned.STAGE, setup, device)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No choice of before, and times that this machine, which may be busy, can repeat."""
    monkeypatch.setenv("CNNLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(plans, "MIN_STEPS", 2)
    monkeypatch.setattr(plans, "MAX_STEPS", 2)
    monkeypatch.setattr(autotune, "STEADY", math.inf)
    monkeypatch.setattr(plans_of_persistent, "candidates", lambda *given: [choose(*given)])
    return tmp_path


def test_plans_are_compared_once_and_the_choice_is_recorded(device: Device, cache: Path) -> None:
    made = []
    for _ in range(2):
        with open_engine(BOTH, awkward(), 4, device, tune=True) as engine:
            choices = dict(engine.choices)
            made.append((type(engine), choices))
            validate(engine, *pictures(awkward(), 4))  # trials leave nothing behind
    assert made[0] == made[1]
    times = list(choices["plan_seconds"].values())
    assert list(choices["plan_seconds"]) == ["persistent", "others"]
    assert all(0 < time < 60 for time in times)
    name = ["persistent", "others"][autotune.fastest(times)]
    assert choices["chosen_plan"] == name
    assert made[0][0] is (PersistentEngine if name == "persistent" else GpuEngine)
    with open_engine(BOTH, awkward(), 4, device) as engine:
        assert engine.choices["chosen_plan"] == "persistent"
        assert "plan_seconds" not in engine.choices


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"persistent": 1.0, "others": 0.5}, "others"),
        ({"persistent": 1.0, "others": 0.99}, "persistent"),  # hardly quicker
        ({"persistent": math.nan, "others": 2.0}, "others"),
        ({}, "persistent"),
    ],
    ids=str,
)
def test_the_fastest_plan_is_chosen(
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    times: dict[str, float],
    chosen: str,
) -> None:
    asked = []

    def seconds(contest: object) -> list[float]:
        asked.append(contest)
        if not times:
            raise Unsteady
        return list(times.values())

    monkeypatch.setattr(plans._Contest, "seconds", seconds)
    with open_engine(BOTH, awkward(), 4, device, tune=True) as engine:
        assert engine.choices["chosen_plan"] == chosen
        said = {k: None if math.isnan(v) else v for k, v in times.items()}
        assert engine.choices.get("plan_seconds", {}) == said
        assert ("did not repeat in 3" in str(engine.choices)) == (not times)
        assert len(asked) == (1 if times else autotune.ATTEMPTS)
        json.dumps(engine.choices, allow_nan=False)


def test_plans_are_timed_in_turn_and_one_that_does_not_fit_takes_no_part(
    device: Device, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    order: list[str] = []

    def timed(self: GpuEngine | PersistentEngine, *given: object) -> float:
        order.append(type(self).__name__)
        self.event_seconds = 2.0 if type(self) is GpuEngine else 4.0
        return 0.0

    def does_not_fit(self: object, *given: object) -> None:
        raise DoesNotFit("no room")

    for engine in (GpuEngine, PersistentEngine):
        monkeypatch.setattr(engine, "train_epoch", timed)
    with open_engine(BOTH, awkward(), 4, device, tune=True) as engine:
        assert engine.choices["plan_seconds"] == {"persistent": 2.0, "others": 1.0}
    assert order == ["PersistentEngine", "GpuEngine"] * (1 + autotune.TRIALS)
    monkeypatch.setattr(GpuEngine, "load", does_not_fit)
    with open_engine(BOTH, awkward(), 3, device, tune=True) as engine:
        assert engine.choices["plan_seconds"] == {"persistent": 2.0, "others": None}
        assert engine.choices["chosen_plan"] == "persistent"
