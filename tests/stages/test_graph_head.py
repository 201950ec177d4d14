"""Plan `graph` of stage tuned, the last layers in one launch: trained as by a launch for each."""

from dataclasses import replace

import numpy as np
import pytest

from cnnlib.device import Device, limits_from
from cnnlib.engine.gpu import GpuEngine
from cnnlib.network import Network
from cnnlib.stages import tuned
from cnnlib.stages.tuned.graph import GraphEngine
from cnnlib.validation.parity import compare_logits, validate
from tests.engine.test_gpu_steps import capturing, two_epochs  # noqa: F401
from tests.support.engines import open_engine, pictures
from tests.support.networks import awkward, build

pytestmark = pytest.mark.usefixtures("in_haste")

EACH = replace(tuned.GRAPH.options, head=0, gathers_ahead=False)
HEAD = replace(EACH, head=4096, gathers_ahead=True)
DENSE = build("dense", (1, 6, 6), 3, [{"dense": 90}, {"activation": "relu"}, {"dense": 3}])
"""Every layer belongs to the head."""
DROPPING = build(
    "dropping",
    (2, 9, 9),
    3,
    [
        {"conv": {"maps": 20, "kernel": 4}},
        {"activation": "relu"},
        {"dropout": 0.5},
        {"dense": 21},
        {"activation": "scaled_tanh"},
        {"dropout": 0.5},
        {"dense": 9},
        {"activation": "tanh"},
        {"dense": 3},
    ],
)
"""A head of two layers behind one that drops out."""


@pytest.mark.parametrize(
    ("network", "layers", "loss"),
    [
        (DENSE, 2, "cross_entropy"),
        (DROPPING, 2, "cross_entropy"),
        (awkward(), 2, "mean_squared_error"),
    ],
    ids=["dense", "dropping", "awkward"],
)
def test_a_head_trains_alike(
    network: Network,
    layers: int,
    loss: str,
    capturing: Device,  # noqa: F811
) -> None:
    """Of a launch for each layer what rounding allows; bit for bit whatever launches a step."""
    each = replace(tuned.GRAPH, options=EACH)
    expected = two_epochs(each, network, capturing, loss=loss)
    first = None
    for options in (
        HEAD,
        replace(HEAD, launch="graph", gather="host"),
        replace(HEAD, launch="each", gathers_ahead=False),
    ):
        found = two_epochs(replace(tuned.GRAPH, options=options), network, capturing, loss=loss)
        first = first or found
        for right, one, other in zip(expected, first, found, strict=True):
            np.testing.assert_allclose(one, right, rtol=2e-4, atol=2e-5)
            np.testing.assert_array_equal(one, other, err_msg=str(options))
    loads = two_epochs(
        *(replace(tuned.GRAPH, options=HEAD), network, capturing), loss=loss, resident_images=20
    )
    np.testing.assert_array_equal(loads[4], first[4])
    stage = replace(tuned.GRAPH, options=HEAD)
    with open_engine(stage, network, 7, capturing, loss=loss) as engine:
        assert isinstance(engine, GraphEngine)
        assert engine._head is not None
        assert len(engine._head.layers) == layers
        plan = GraphEngine.plans_on(stage, engine.setup, limits_from(capturing))[0]
        convolutions = len(engine.operators) - layers
        assert plan.facts["kernels_a_step"] == 2 * convolutions + 2
        validate(engine, *pictures(network, 7))
        validate(engine, *pictures(network, 5, seed=1))  # values of the batch before stay there
        compare_logits(engine, pictures(network, 7)[0])


def test_the_update_is_that_of_other_stages(capturing: Device) -> None:  # noqa: F811
    """The update with all loads of a thread in flight, beside that of kernels/counted_batch.cuh."""
    each = replace(tuned.GRAPH, options=EACH)
    expected = two_epochs(replace(each, engine=GpuEngine), awkward(), capturing)
    found = two_epochs(each, awkward(), capturing)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def test_what_is_no_head(device: Device) -> None:
    """A limit that is too small for a layer, and a batch that is too large."""
    for options in (replace(HEAD, head=14), replace(HEAD, head_batch=3)):
        stage = replace(tuned.GRAPH, options=options)
        with open_engine(stage, awkward(), 4, device) as engine:
            assert isinstance(engine, GraphEngine)
            assert engine._head is None
            assert not engine.gathers_ahead
