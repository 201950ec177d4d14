"""Images on their way to the device: which ones arrive where, in which parts, and when."""

import math

import numpy as np
import pytest

from cnnlib.device import Device
from cnnlib.engine import Bytes
from cnnlib.engine.upload import WORTH_A_THREAD, LoadTimer, ResidentImages, resident_limit
from cnnlib.errors import DoesNotFit

pytestmark = pytest.mark.quick


def numbered(count: int) -> tuple[Bytes, Bytes]:
    """Images (count, 1, 2, 2) whose bytes say which image it is, and labels."""
    numbers = np.arange(count)
    images = np.stack([numbers % 251, numbers // 251, numbers % 7, numbers % 13], axis=1)
    return images.reshape(count, 1, 2, 2).astype(np.uint8), (numbers % 10).astype(np.uint8)


@pytest.mark.parametrize("limit", [1, 8, 20, 41, 1000])
@pytest.mark.parametrize("piece_bytes", [1, 4 * 16, math.inf])
def test_each_piece_holds_the_images_that_the_order_names(
    device: Device, limit: int, piece_bytes: float
) -> None:
    images, labels = numbered(41)
    order = np.random.default_rng(0).permutation(41)[:40]
    resident = ResidentImages(device, images, labels, 8, limit, piece_bytes)
    seen: list[int] = []
    for load in resident.loads(len(order)):
        assert load.stop - load.start <= resident.count
        stop = 0
        for piece in resident.load(order[load]):
            assert piece.start == stop
            assert (piece.stop - piece.start) % 8 == 0
            stop = piece.stop
            chosen = order[load][piece]
            assert np.array_equal(resident.images.get()[piece], images[chosen])
            assert np.array_equal(resident.labels.get()[piece], labels[chosen])
            seen += chosen.tolist()
        assert stop == load.stop - load.start
    assert seen == order.tolist()
    resident.close()


@pytest.mark.parametrize(
    ("limit", "count"), [(1, 8), (8, 8), (15, 8), (39, 32), (41, 40), (10**9, 40)]
)
def test_whole_batches_are_resident(device: Device, limit: int, count: int) -> None:
    resident = ResidentImages(device, *numbered(41), batch=8, limit=limit)
    assert resident.count == count
    assert resident.images.shape == (count, 1, 2, 2)
    resident.close()


def test_several_threads_gather_what_one_would(device: Device) -> None:
    count = 5 * WORTH_A_THREAD + 3
    images, labels = numbered(count)
    order = np.random.default_rng(1).permutation(count)
    resident = ResidentImages(device, images, labels, 1, count)
    (piece,) = resident.load(order)
    assert np.array_equal(resident.images.get(), images[order])
    assert np.array_equal(resident.labels.get(), labels[order])
    assert piece == slice(0, count)
    resident.close()


def test_the_timer_adds_up_all_pieces(device: Device) -> None:
    resident = ResidentImages(device, *numbered(40), batch=8, limit=16, piece_bytes=1)
    timer = LoadTimer(device)
    pieces = sum(
        1 for load in resident.loads(40) for _ in resident.load(np.arange(40)[load], timer)
    )
    assert pieces == 5
    times = timer.times(1.0)
    assert times.total == 1.0
    assert min(times.gather, times.upload, times.kernels) > 0
    assert times.gather + times.upload + times.kernels < 1.0
    resident.close()


def test_half_of_the_free_memory_is_taken_unless_a_number_is_given(device: Device) -> None:
    assert resident_limit(device, 12, 784) == 12
    free = device.free_bytes()
    assert resident_limit(device, "auto", 784) == pytest.approx(free / 2 / 785, rel=0.05)


def test_arrays_that_kernels_cannot_index_are_refused(device: Device) -> None:
    class Many(np.ndarray):
        """Labels that claim to be more than 32-bit indices can count."""

        def __len__(self) -> int:
            return 2**31

    images, labels = numbered(8)
    with pytest.raises(DoesNotFit, match="beyond 32-bit indices"):
        ResidentImages(device, images, labels.view(Many), 1, 2**31)
