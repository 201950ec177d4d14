"""The order of an epoch: a permutation, as even as a random one, and the same on a device."""

import numpy as np
import pytest

from cnnlib.engine.shuffle import ROUNDS, Shuffle
from cnnlib.stages import tuned
from tests.support.engines import training
from tests.support.networks import awkward, small

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 17, 90, 1000, 4096, 4097, 65536, 65537])
def test_it_is_a_permutation(count: int) -> None:
    order = Shuffle(count, 3, 1).indices()
    assert order.shape == (count,)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


def test_seed_and_epoch_decide() -> None:
    orders = [Shuffle(1000, seed, epoch).indices() for seed in (1, 2) for epoch in (1, 2)]
    for i, first in enumerate(orders):
        np.testing.assert_array_equal(
            first, Shuffle(1000, (1, 1, 2, 2)[i], (1, 2, 1, 2)[i]).indices()
        )
        for second in orders[i + 1 :]:
            # two random permutations of 1000 share one place on average
            assert (first == second).sum() < 10


@pytest.mark.parametrize("count", [1, 90, 60000, 65537, 2**31 - 1])
def test_tables_are_those_that_numpy_draws(count: int) -> None:
    """So the orders of all published runs; NumPy keeps PCG64 as it is, but not its integers."""
    for seed, epoch in ((0, 0), (3, 1), (2**40 + 1, 2**32)):
        shuffle = Shuffle(count, seed, epoch)
        size = 1 << shuffle.half
        random = np.random.default_rng((seed, epoch))
        wanted = random.integers(0, size, (ROUNDS, size), dtype=np.uint16)
        np.testing.assert_array_equal(shuffle.tables, wanted)
        assert shuffle.tables.dtype == np.uint16


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("count", [48, 64, 1000])
def test_every_image_comes_everywhere_alike(count: int) -> None:
    """Chi-square tests of the place of each image, and of its successor, over many epochs.

    With count^2 cells in classes of 16 x 16 its mean is 225 for sixteen fixed margins each way and
    its deviation 21; 330 is five deviations.
    """
    epochs = 400
    places, followers = np.zeros((16, 16)), np.zeros((16, 16))
    for epoch in range(epochs):
        order = Shuffle(count, 11, epoch).indices()
        kind, place = order * 16 // count, np.arange(count) * 16 // count
        np.add.at(places, (place, kind), 1)
        np.add.at(followers, (kind[:-1], kind[1:]), 1)
    assert chi_square(places) < 330
    # No image follows itself; with few images that shows: 310 to 336 by numpy's permutations.
    assert chi_square(followers) < 420


@pytest.mark.parametrize("count", [40, 90])
def test_a_device_draws_the_same(count: int, device) -> None:
    network = awkward()
    results = []
    for drawn_there in (False, True):
        with training(tuned.STAGE, network, 8, count, device, momentum=0.5) as engine:
            shuffle = Shuffle(count, 5, 2)
            if drawn_there:
                loss = engine.train_epoch(shuffle)
                order = engine._set.order.get()[:count]
                np.testing.assert_array_equal(order, shuffle.indices())
            else:
                loss = engine.train(shuffle.indices())
            results.append((loss, engine.parameters))
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("count", [1, 90, 5000])
def test_a_device_draws_the_same_tables(count: int, device, monkeypatch) -> None:
    with training(tuned.PERSISTENT, small(), 1, count, device) as engine:
        for shuffle in (Shuffle(count, 2**40 + 5, 2**32 - 1), Shuffle(count, 0, 2**63 + 1)):
            engine._set.load(shuffle, slice(0, count)).__next__()
            np.testing.assert_array_equal(engine._set._tables.get(), shuffle.tables)
            np.testing.assert_array_equal(engine._set.order.get(), shuffle.indices())
        monkeypatch.setattr(engine._set, "_draw_tables", lambda: pytest.fail("not by the host"))
        for shuffle in (
            Shuffle(count, 2**70, 2**40),  # of more words than a device takes
            Shuffle.given(count, Shuffle(count, 6, 7).tables),
        ):
            engine._set.load(shuffle, slice(0, count)).__next__()
            np.testing.assert_array_equal(engine._set.order.get(), shuffle.indices())


def test_where_not_all_images_fit_the_host_draws(device) -> None:
    with training(tuned.STAGE, awkward(), 8, 40, device, resident_images=16) as engine:
        first = engine.train_epoch(Shuffle(40, 5, 2))
    with training(tuned.STAGE, awkward(), 8, 40, device) as engine:
        assert engine.train_epoch(Shuffle(40, 5, 2)) == pytest.approx(first, rel=1e-6)
