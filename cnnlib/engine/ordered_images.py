"""A training set on a device, whose kernels find each image by an order in device memory."""

from collections.abc import Callable, Iterator

import numpy as np

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Changing, Device, Kernel
from cnnlib.engine.gpu_operator import signed_word
from cnnlib.engine.shuffle import ENTROPY_WORDS, ROUNDS, Shuffle, half_of
from cnnlib.engine.stage import Bytes, Order
from cnnlib.engine.upload import GATHER_BYTES, LoadTimer, ResidentImages, device_array

DRAWING_THREADS = 256
"""Threads of a block of the kernel that draws an order."""


class OrderedImages:
    """Images (N, C, H, W) and labels (N,) as bytes on a device, `count` of them at a time.

    Where all of them may be there (`gathered_there`, and N within `limit`), they lie as they are
    given, and `order` says which image comes when. Otherwise the host gathers each load in the
    order of the training (ResidentImages), and `order` counts from 0. Raises DoesNotFit where the
    device has no room for a batch.
    """

    def __init__(
        self,
        device: Device,
        images: Bytes,
        labels: Bytes,
        batch: int,
        limit: int,
        shuffle_images: Kernel,
        piece_bytes: float = GATHER_BYTES,
        gathered_there: bool = True,
        draw_tables: Kernel | None = None,
    ) -> None:
        """`shuffle_images` and `draw_tables`, without which the host draws the tables of an order,
        are kernels of kernels/shuffle.cuh, `piece_bytes` that of ResidentImages.
        """
        self._streamed: ResidentImages | None = None
        if gathered_there and limit >= len(labels):
            self.count = len(labels)
            self.images = device_array(device, images.shape, np.uint8)
            """(count, C, H, W) on the device."""
            self.labels = device_array(device, labels.shape, np.uint8)
            """(count,) on the device."""
            self.images.set(np.ascontiguousarray(images))
            self.labels.set(np.ascontiguousarray(labels))
        else:
            self._streamed = ResidentImages(device, images, labels, batch, limit, piece_bytes)
            self.count = self._streamed.count
            self.images, self.labels = self._streamed.images, self._streamed.labels
        self.order = device_array(device, (max(self.count, len(labels)),), np.int32)
        """(N,) on the device: the element of `images` that comes next, and so on."""
        self.order.set(np.arange(self.order.size, dtype=np.int32))
        half = half_of(self.count)
        self._tables = device_array(device, (ROUNDS, 1 << half), np.uint16)
        blocks = ceil_div(self.count, DRAWING_THREADS)
        self._shuffle_images = shuffle_images.bind(
            blocks, DRAWING_THREADS, self._tables, self.order, half, self.count
        )
        self._entropy = [Changing() for _ in range(ENTROPY_WORDS)]
        self._draw_tables: Callable[[], None] | None = None
        if draw_tables is not None:
            blocks, given = ceil_div(self._tables.size, 4 * DRAWING_THREADS), self._entropy
            self._draw_tables = draw_tables.bind(
                blocks, DRAWING_THREADS, self._tables, half, *given
            )

    def draws(self, shuffle: Shuffle) -> bool:
        """Whether the device itself draws this order."""
        return self._streamed is None and len(shuffle) == self.count

    def loads(self, count: int) -> Iterator[slice]:
        """The parts of an order of `count` images that are on the device together."""
        if self._streamed is None:
            yield slice(0, count)
        else:
            yield from self._streamed.loads(count)

    def load(
        self, order: Order | Shuffle, load: slice, timer: LoadTimer | None = None
    ) -> Iterator[slice]:
        """Bring the images of a load of `order` to the device, and their order, piece by piece.

        Yields each piece's range in `self.order` as soon as its copies have been asked for; kernels
        launched on it then follow them. With `timer`, the moments of each piece are recorded.
        """
        if self._streamed is not None:
            indices = order.indices() if isinstance(order, Shuffle) else order
            yield from self._streamed.load(indices[load], timer)
            return
        if timer:
            timer.begin()
        if isinstance(order, Shuffle):
            self._bring_tables(order)
            self._shuffle_images()
        if timer:
            timer.gathered()
        if not isinstance(order, Shuffle):
            wanted = np.ascontiguousarray(order[load], dtype=np.int32)
            self.order.part(0, wanted.shape).set(wanted)
        if timer:
            timer.uploaded()
        yield slice(0, load.stop - load.start)
        if timer:
            timer.trained()

    def _bring_tables(self, shuffle: Shuffle) -> None:
        if self._draw_tables is None or shuffle.entropy is None:
            self._tables.set(shuffle.tables)
            return
        for argument, word in zip(self._entropy, shuffle.entropy, strict=True):
            argument.value = signed_word(word)
        self._draw_tables()

    def close(self) -> None:
        """End the gathering threads, if there are any."""
        if self._streamed is not None:
            self._streamed.close()
