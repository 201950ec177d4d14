"""Training images on the way to a device, as many at a time as it has room for.

The whole training set stays on the host. An epoch is cut into *loads*, each of as many images as
the device keeps, and a load into *pieces*: the host gathers the next piece into page-locked memory
while the device still copies and trains on the last one.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Device, DeviceArray
from cnnlib.engine.stage import Bytes, Order
from cnnlib.errors import DoesNotFit
from cnnlib.system.machine import usable_cores

MAX_ELEMENTS = 2**31 - 1
"""Elements that an array may have: kernels index with 32-bit integers."""
GATHER_BYTES = 4 * 2**20
"""Bytes of images in a piece: enough to use the bus, few enough to overlap."""
GATHER_THREADS = 4
"""Upper bound of the host threads that gather: they hide memory latency, not bandwidth."""
WORTH_A_THREAD = 512
"""Images for which waking another gathering thread pays."""


class LoadTimes(NamedTuple):
    """Seconds of one training over some images, by what they went into."""

    total: float
    gather: float
    """Host: choosing images and copying them into page-locked memory."""
    upload: float
    """Device: copies to it."""
    kernels: float
    """Device: from the first to the last kernel between uploads."""


class LoadTimer:
    """Measures where the time of a training goes, piece by piece.

    Each piece passes `begin`, `gathered`, `uploaded` and `trained` in this order. Measuring takes a
    little time of its own: four events a piece.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pieces: list[_Piece] = []

    def begin(self) -> None:
        """The host begins to gather a piece."""
        self._pieces.append(_Piece(self._device))

    def gathered(self) -> None:
        """The host has gathered the piece."""
        self._pieces[-1].end_gather()

    def uploaded(self) -> None:
        """All copies of the piece have been asked for."""
        self._pieces[-1].uploaded.record()

    def trained(self) -> None:
        """All kernels that train on the piece have been launched."""
        self._pieces[-1].trained.record()

    def times(self, total: float) -> LoadTimes:
        """The sums over all pieces, of a training that took `total` seconds."""
        pieces = self._pieces
        return LoadTimes(
            total,
            sum(piece.gather for piece in pieces),
            sum(piece.uploaded.seconds_since(piece.gathered) for piece in pieces),
            sum(piece.trained.seconds_since(piece.uploaded) for piece in pieces),
        )


class _Piece:
    """Three moments of one piece on the device's clock, and its gathering on the host's."""

    def __init__(self, device: Device) -> None:
        self.gathered, self.uploaded, self.trained = (device.event() for _ in range(3))
        self.gather = 0.0
        self._began = time.perf_counter()

    def end_gather(self) -> None:
        self.gather = time.perf_counter() - self._began
        self.gathered.record()


class ResidentImages:
    """A training set on the host; `count` of its images at a time lie on the device.

    images (N, C, H, W) and labels (N,) are bytes. `count` is the largest multiple of `batch` that
    neither `limit` nor N exceeds, and at least one batch. Raises DoesNotFit where the device has no
    room for so many.
    """

    def __init__(
        self,
        device: Device,
        images: Bytes,
        labels: Bytes,
        batch: int,
        limit: int,
        piece_bytes: float = GATHER_BYTES,
    ) -> None:
        """`piece_bytes`: bytes of images in a piece; math.inf makes every load one piece."""
        shape = images.shape[1:]
        self.count = count = max(batch, min(limit, len(labels)) // batch * batch)
        self.images = device_array(device, (count, *shape), np.uint8)
        """(count, C, H, W) on the device."""
        self.labels = device_array(device, (count,), np.uint8)
        """(count,) on the device."""
        self._device = device
        self._all_images, self._all_labels = images, labels
        self._pinned_images = device.pinned((count, *shape), np.uint8)
        self._pinned_labels = device.pinned((count,), np.uint8)
        fits = int(min(piece_bytes, images.nbytes) // math.prod(shape))
        self._piece = max(batch, fits // batch * batch)
        self._gatherers = min(GATHER_THREADS, usable_cores())
        self._pool = ThreadPoolExecutor(self._gatherers)

    def loads(self, count: int) -> Iterator[slice]:
        """The parts of an order of `count` images that are on the device together.

        Waits for the device between two loads: page-locked memory may be filled again only when its
        images have been copied.
        """
        for start in range(0, count, self.count):
            if start:
                self._device.synchronize()
            yield slice(start, min(start + self.count, count))

    def load(self, order: Order, timer: LoadTimer | None = None) -> Iterator[slice]:
        """Bring the images of `order`, `count` of them at most, to the device piece by piece.

        Image i of the order becomes element i of `images` and `labels`. Yields each piece's range
        of elements as soon as its copies have been asked for; kernels launched on it then follow
        them. With `timer`, the moments of each piece are recorded.
        """
        for start in range(0, len(order), self._piece):
            piece = slice(start, min(start + self._piece, len(order)))
            if timer:
                timer.begin()
            self._gather(self._all_images, order[piece], self._pinned_images[piece])
            self._gather(self._all_labels, order[piece], self._pinned_labels[piece])
            if timer:
                timer.gathered()
            self._upload(self._pinned_images[piece], self.images, start)
            self._upload(self._pinned_labels[piece], self.labels, start)
            if timer:
                timer.uploaded()
            yield piece
            if timer:
                timer.trained()

    def _gather(self, images: Bytes, order: Order, out: Bytes) -> None:
        """out[i] = images[order[i]], by several threads where there is enough to do."""

        def take(part: slice) -> None:
            # mode="clip" writes straight into `out`; the default would go through a copy
            np.take(images, order[part], axis=0, out=out[part], mode="clip")

        share = max(WORTH_A_THREAD, ceil_div(len(order), self._gatherers))
        parts = [slice(i, min(i + share, len(order))) for i in range(0, len(order), share)]
        if len(parts) == 1:
            take(parts[0])
        else:
            list(self._pool.map(take, parts))

    def _upload(self, pinned: Bytes, images: DeviceArray, start: int) -> None:
        """Copy to the elements of `images` from `start` on."""
        images.part(start * math.prod(pinned.shape[1:]), pinned.shape).set(pinned)

    def close(self) -> None:
        """End the gathering threads."""
        self._pool.shutdown()


def resident_limit(device: Device, images: int | Literal["auto"], image_bytes: int) -> int:
    """How many images of `image_bytes` each, with a label, may be on the device at a time.

    images: the number itself or "auto", which is half of what fits into the free memory: the other
    half is left for the device's other users.
    """
    if images == "auto":
        return device.free_bytes() // 2 // (image_bytes + 1)
    return images


def device_array(
    device: Device, shape: tuple[int, ...], dtype: DTypeLike = np.float32
) -> DeviceArray:
    """A new array on the device, every byte 0xFF.

    Raises DoesNotFit where memory is too small, or the array too large for 32-bit indices.
    """
    if math.prod(shape) > MAX_ELEMENTS:
        raise DoesNotFit(f"an array of {shape} elements is beyond 32-bit indices")
    return device.array(shape, dtype)
