"""Plan persistent without barriers of the grid: blocks that hand each other stamped numbers.

An emulated device runs as many blocks at once as it has threads, so that blocks can wait for each
other there too.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from cnnlib.device import Limits
from cnnlib.device.emulated import EmulatedDevice
from cnnlib.engine import Setup, Stage
from cnnlib.engine.shuffle import Shuffle
from cnnlib.stages.tuned import PERSISTENT
from cnnlib.stages.tuned.engine import PersistentEngine
from cnnlib.stages.tuned.operator import TunedFactory
from cnnlib.stages.tuned.plan import BlockPlan, PersistentOptions
from tests.support.engines import pictures
from tests.support.networks import lenet5

STEPS = 3


class WholeEpochs(PersistentEngine):
    """Trains by one launch on an emulated device too, which needs stamps instead of barriers."""

    def _build(self, plan: BlockPlan) -> None:
        self.whole = True
        super()._build(plan)

    @classmethod
    def kernels_on(cls, stage: Stage[TunedFactory], setup: Setup, limits: Limits) -> Sequence[str]:  # type: ignore[override]
        return [*super().kernels_on(stage, setup, limits), "step_train"]


def trained(
    engine_class: type[PersistentEngine],
    options: PersistentOptions,
    blocks: int,
    batch: int,
    fiber_order: str = "forward",
) -> list[np.ndarray]:
    """Parameters and velocity after each of two epochs of STEPS steps of LeNet-5."""
    network = lenet5()
    setup = Setup(network, batch, 0.05, momentum=0.9, mean=33.0, deviation=78.0)
    stage = replace(PERSISTENT, engine=engine_class, options=options)
    found = []
    with (
        EmulatedDevice(threads=blocks, fiber_order=fiber_order) as device,
        engine_class(stage, setup, device) as engine,
    ):
        assert engine.block.stamped == options.stamped
        engine.load(*pictures(network, STEPS * batch))
        engine.parameters = network.initial_parameters(1)
        for epoch in range(2):
            engine.train_epoch(Shuffle(STEPS * batch, 1, epoch))
            found += [engine.parameters, engine.velocity]
    return found


@pytest.mark.parametrize(
    ("blocks", "batch", "options"),
    [
        (46, 2, PersistentOptions()),
        # more images than a warp takes at once
        (52, 9, PersistentOptions(products=("tf32",))),
    ],
)
def test_stamps_and_barriers_train_alike_to_the_last_bit(
    blocks: int, batch: int, options: PersistentOptions
) -> None:
    wanted = trained(PersistentEngine, replace(options, stamped=False), blocks, batch)
    for order in ("forward", "reverse"):
        found = trained(WholeEpochs, replace(options, stamped=True), blocks, batch, order)
        for one, other in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_blocks_wait_at_barriers_where_too_few_have_no_image() -> None:
    with EmulatedDevice(threads=60) as device:
        plans = [
            PersistentEngine.plan_on(PERSISTENT, Setup(lenet5(), batch, 0.1), device)
            for batch in (19, 20)
        ]
    assert [plan.stamped for plan in plans] == [True, False]
    assert "TUNED_STAMPED_ENTRY_POINTS" in plans[0].source()
    assert "TUNED_ENTRY_POINTS" in plans[1].source()
