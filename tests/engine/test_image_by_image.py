"""Trainings that stop between two images, and those of other engines, which stop between steps."""

import numpy as np
import pytest

from cnnlib.engine import ImageByImage
from cnnlib.engine.image_by_image import continue_step, train_units, unfinished_of, unit_of
from cnnlib.stages import gemm, naive
from tests.support.engines import training
from tests.support.networks import small

pytestmark = pytest.mark.quick

RATES = np.array([0.5, 0.25])


def test_a_training_continues_within_a_step() -> None:
    order = np.array([5, 1, 4, 2, 0, 3, 7, 6])
    with training(naive.STAGE, small(), 4, 8, momentum=0.5) as engine:
        assert isinstance(engine, ImageByImage)
        assert unit_of(engine) == 1
        loss = engine.train(order, RATES)
        whole = engine.parameters, engine.velocity
    with training(naive.STAGE, small(), 4, 8, momentum=0.5) as engine:
        losses = train_units(engine, order[:3], RATES[:0])
        assert losses == 0
        saved = engine.parameters, engine.velocity, unfinished_of(engine)
    with training(naive.STAGE, small(), 4, 8, momentum=0.5) as engine:
        engine.parameters, engine.velocity = saved[:2]
        continue_step(engine, saved[2])
        losses += train_units(engine, order[3:5], RATES[:1])
        losses += train_units(engine, order[5:], RATES[1:])
        assert losses / 2 == pytest.approx(loss, rel=1e-12)
        assert engine.parameters == pytest.approx(whole[0], rel=1e-12)
        assert engine.velocity == pytest.approx(whole[1], rel=1e-12)
        assert unfinished_of(engine)[-1] == 0


def test_other_engines_do_whole_steps() -> None:
    order = np.arange(8)
    with training(gemm.STAGE, small(), 4, 8) as engine:
        assert not isinstance(engine, ImageByImage)
        assert unit_of(engine) == 4
        loss = engine.train(order, RATES)
    with training(gemm.STAGE, small(), 4, 8) as engine:
        losses = sum(
            train_units(engine, order[step * 4 : step * 4 + 4], RATES[step : step + 1])
            for step in range(2)
        )
        assert losses / 2 == pytest.approx(loss, rel=1e-6)
        nothing = unfinished_of(engine)
        assert nothing.shape == (0,)
        continue_step(engine, nothing)
        with pytest.raises(ValueError, match="steps of this engine are done whole"):
            continue_step(engine, np.zeros(3))


def test_the_sum_of_another_network_is_refused() -> None:
    with training(naive.STAGE, small(), 4, 8) as engine:
        with pytest.raises(ValueError, match="another network"):
            continue_step(engine, np.zeros(3))
