import itertools

import numpy as np
import pytest

from cnnlib.engine import learning_rate
from cnnlib.engine.learning_rate import Schedule

pytestmark = pytest.mark.quick


def test_a_constant_rate() -> None:
    np.testing.assert_array_equal(Schedule(0.1).rates(2, 3, 4), [0.1] * 4)


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing() -> None:
    schedule = Schedule(0.4, warmup=0.25)
    rates = np.concatenate([schedule.rates(epoch, 4, 5) for epoch in (1, 2, 3, 4)])
    assert rates[:5] == pytest.approx(0.4 * np.arange(1, 6) / 5)
    assert rates[5:] == pytest.approx(0.4 * np.arange(15, 0, -1) / 15)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 7), (3, 5)])
def test_rates_stay_between_nothing_and_the_peak(warmup: float, epochs: int, steps: int) -> None:
    schedule = Schedule(1.5, warmup)
    parts = [schedule.rates(epoch, epochs, steps) for epoch in range(1, epochs + 1)]
    rates = np.concatenate(parts)
    assert rates.shape == (epochs * steps,)
    assert (rates > 0).all()
    assert (rates <= 1.5).all()
    top = int(rates.argmax())
    assert all(a <= b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(rates[top:]))


def test_kept_rates_are_those_that_each_epoch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(0.3, warmup=0.3)
    kept = [schedule.rates(epoch, 3, 7) for epoch in (3, 1, 2)]
    monkeypatch.setattr(learning_rate, "KEPT_STEPS", 20)
    for epoch, rates in zip((3, 1, 2), kept, strict=True):
        assert rates.tobytes() == schedule.rates(epoch, 3, 7).tobytes()
        with pytest.raises(ValueError, match="read-only"):
            rates[0] = 0


def test_after_the_last_epoch_rates_stay_those_of_the_last() -> None:
    schedule = Schedule(0.4, warmup=0.25)
    np.testing.assert_array_equal(schedule.rates(9, 4, 5), schedule.rates(4, 4, 5))
