"""Every kind of layer and every activation function, in every stage that has an operator for it.

The networks are made from cnnlib.layers alone, so that a layer or a function that is added there is
compared with finite differences and with the reference without a test of its own.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from cnnlib.device import Device
from cnnlib.engine import Stage
from cnnlib.errors import ConfigError
from cnnlib.layers import FUNCTIONS, KINDS, Activation, Layer
from cnnlib.network import Network
from cnnlib.stages import naive
from cnnlib.validation.parity import validate
from cnnlib.validation.spot_checks import finite_differences
from cnnlib.validation.verdicts import ValidationFailed
from tests.support.engines import STAGES, open_engine, pictures, skip_if_declined
from tests.support.networks import build

pytestmark = pytest.mark.usefixtures("in_haste")

QUICK = ("naive", "gemm", "fused")
SHAPE = (1, 17, 17)


def values(kind: type[Layer], field: str) -> list[object]:
    """The values with which a layer's setting is tried: all of a few, or else one."""
    schema = kind.model_json_schema()["properties"][field]
    if "enum" in schema:
        return list(schema["enum"])
    if "default" in schema:
        return [schema["default"]]
    if schema.get("type") == "integer":
        return [max(2, schema.get("minimum", 0))]
    if schema.get("type") == "number":
        low = schema.get("exclusiveMinimum", schema.get("minimum", 0))
        high = schema.get("exclusiveMaximum", schema.get("maximum", low + 1))
        return [(low + high) / 2]
    raise LookupError(f"{kind.__name__}.examples are needed: no value is known for '{field}'")


def examples(kind: type[Layer]) -> Iterator[dict[str, object]]:
    """Settings with which a layer is tried, its own or those with each value of each choice."""
    if kind.examples:
        yield from kind.examples
        return
    fields = list(kind.model_fields)
    for chosen in itertools.product(*(values(kind, field) for field in fields)):
        yield dict(zip(fields, chosen, strict=True))


def around(name: str, layer: object) -> Network:
    """A small network with the layer in all places where it fits.

    These are at the bottom, behind a convolution, before subsampling by the maximum and by the
    mean, behind subsampling, and behind a dense layer.
    """
    taken: list[object] = []
    for piece in (
        layer,
        {"conv": {"maps": 3, "kernel": 2}},
        layer,
        {"subsample": {"size": 2, "method": "max"}},
        {"conv": {"maps": 2, "kernel": 3}},
        layer,
        {"subsample": {"size": 2, "method": "mean"}},
        layer,
        {"dense": 7},
        layer,
    ):
        try:
            build(name, SHAPE, 4, [*taken, piece, {"dense": 4}])
        except ConfigError:
            continue  # its source has another shape
        taken.append(piece)
    assert layer in taken, f"{layer} fits nowhere"
    return build(name, SHAPE, 4, [*taken, {"dense": 4}])


CASES: dict[str, tuple[type[Layer], dict[str, object]]] = {
    " ".join([kind.kind, *map(str, settings.values())]): (kind, settings)
    for kind in KINDS.values()
    for settings in examples(kind)
}


@pytest.mark.quick
def test_every_kind_and_every_function_has_a_case() -> None:
    assert {kind for kind, _ in CASES.values()} == set(KINDS.values())
    tried = [settings["function"] for kind, settings in CASES.values() if kind is Activation]
    assert tried == list(FUNCTIONS)


@pytest.mark.quick
@pytest.mark.parametrize("name", CASES)
def test_loops_agree_with_finite_differences(name: str) -> None:
    kind, settings = CASES[name]
    network = around(name, {kind.kind: settings})
    images, labels = pictures(network, 2)
    with open_engine(naive.STAGE, network, 2) as engine:
        positions = np.random.default_rng(0).permutation(network.parameter_count)[:20]
        finite_differences(engine, images, labels, positions)


@pytest.mark.quick
def test_a_wrong_derivative_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong kernels are tried by the files of tests/wrong/."""
    wrong = dataclasses.replace(FUNCTIONS["tanh"], derivative=lambda x, y: 1 - y)
    monkeypatch.setitem(FUNCTIONS, "tanh", wrong)
    with pytest.raises(ValidationFailed, match="finite difference"):
        test_loops_agree_with_finite_differences("activation tanh")


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        pytest.param(
            stage,
            name,
            id=f"{stage.name}-{name}",
            marks=[pytest.mark.quick] * (stage.name in QUICK),
        )
        for stage in STAGES
        for name, (kind, _) in CASES.items()
        if any(kind in run for run in stage.operators)
    ],
)
def test_operators_agree_with_the_reference(stage: Stage, name: str, device: Device) -> None:
    kind, settings = CASES[name]
    network = around(name, {kind.kind: settings})
    skip_if_declined(stage, network)
    with open_engine(stage, network, 7, device) as engine:
        validate(engine, *pictures(network, 7))
