"""When every block of stage tuned is in which section of a step, by clocks that the blocks read.

The kernels are those that train, compiled a second time with a mark at the end of each section
(kernels/tuned/timeline.cuh); what is trained and timed elsewhere knows nothing of it. On a GPU the
clocks of the multiprocessors have no common zero: they are set by the first barrier of the grid,
which all blocks leave within some tens of nanoseconds, or, where blocks hand each other stamped
numbers and wait at no barrier, by the clock that all multiprocessors share, which is coarser. An
emulated device has no such barriers, and its blocks run one after another: there the marks can be
checked, and their times say nothing.
"""

from typing import NamedTuple

import numpy as np

from cnnlib.device import DeviceArray
from cnnlib.engine.stage import Order
from cnnlib.layers import Array
from cnnlib.stages.tuned.engine import PersistentEngine
from cnnlib.stages.tuned.plan import BlockPlan

HEAD = 3
"""Words before a block's marks: their count, and the shared clock at two beginnings of a step."""
WAITS = ("wait for all blocks", "update", "wait for all blocks again")
"""The sections behind those of the layers."""
WAITING_UPDATE = "wait for gradients, and update"
"""What WAITS[1] is in a block without an image that waits at no barrier: most of it is waiting, for
one number after another.
"""


class Section(NamedTuple):
    """One block in one section of one step; seconds since the first block's first mark."""

    step: int
    """From 1."""
    block: int
    name: str
    part: str
    """input, forward, loss, backward, update, or wait."""
    begin: float
    end: float


class MarkedEngine(PersistentEngine):
    """A PersistentEngine that can also train steps whose sections are marked."""

    def _build(self, plan: BlockPlan) -> None:
        super()._build(plan)
        kernels = ["mark_train"] if self.whole else ["mark_forward_backward", "mark_update"]
        name, _ = self._names
        names = [f"step_{kernel}" for kernel in kernels]
        self.marked = self.device.compile(plan.source(timeline=True), f"{name}_timeline", names)

    def train_marked(self, order: Order) -> list[Section]:
        """Train the steps of `order` (at least two, on the images that were loaded); the sections.

        The rates are those of the setup.
        """
        batch = self.setup.batch_size
        steps = len(order) // batch
        if steps < 2:
            raise ValueError(f"{steps} steps: the length of a tick is known from two on")
        given = self._loaded()
        indices = self.array((steps * batch,), np.int32)
        indices.set(np.ascontiguousarray(order[: steps * batch], dtype=np.int32))
        loaded = self._rates, self._last_rates, self._constant_rates
        self._allocate_rates(steps)
        self._upload_rates(self.rates_of(steps, None))
        self._losses.fill_bytes(0)
        each = 2 * len(self._sections()) * -(-batch // self.grid) + len(WAITS) + 2
        room = steps * each
        marks = self.array((self.grid, HEAD + 2 * room), np.uint64)
        marks.fill_bytes(0)
        plain, self.module = self.module, self.marked
        try:
            if self.whole:
                self._train_whole(given.images, given.labels, indices, steps, marks, room)
            else:
                self._train_phases(given.images, given.labels, indices, steps, marks, room)
        finally:
            self.module = plain
            self._rates, self._last_rates, self._constant_rates = loaded
        self._number += steps
        return self.sections_of(marks.get(), room)

    def _train_whole(
        self,
        images: DeviceArray,
        labels: DeviceArray,
        order: DeviceArray,
        steps: int,
        marks: DeviceArray,
        room: int,
    ) -> None:
        """All steps in one launch, with barriers of the grid."""
        self._signals.fill_bytes(0)
        self._bind_images(
            "mark_train",
            images,
            labels,
            order,
            self.setup.batch_size,
            self._velocity,
            self._rates,
            float(self.setup.momentum),
            steps,
            self._signals.part(0, (1,)),
            self._signals.part(1, (1,)),
            marks,
            room,
            *self._stamped(self._stamps(steps)),
        )()
        self._check_signals()

    def _train_phases(
        self,
        images: DeviceArray,
        labels: DeviceArray,
        order: DeviceArray,
        steps: int,
        marks: DeviceArray,
        room: int,
    ) -> None:
        """Each phase as a launch of its own."""
        batch = self.setup.batch_size
        for step in range(steps):
            part = order.part(step * batch, (batch,))
            self._bind_images("mark_forward_backward", images, labels, part, batch, marks, room)()
            self._bind(
                "mark_update",
                self._parameters,
                self._traces,
                self._partials,
                self._velocity,
                self._rates.part(step, (1,)),
                float(self.setup.momentum),
                batch,
                marks,
                room,
            )()

    def sections_of(self, marks: Array, room: int) -> list[Section]:
        """The sections of all blocks from their marks (grid, HEAD + 2 room)."""
        names = [named(layers, kernel, part) for layers, kernel, part, _ in self._sections()]
        names += [(WAITS[0], "wait"), (WAITS[1], "update"), (WAITS[2], "wait")]
        waited = len(names) - len(WAITS)
        tick = length_of_a_tick(marks)
        zeros = self._zeros(marks, waited, tick)
        first_idle = self.setup.batch_size if self.whole and self.block.stamped else self.grid
        found: list[Section] = []
        for block, words in enumerate(marks):
            count = int(words[0])
            if count > room:
                raise ValueError(
                    f"block {block} has left {count} marks, and there is room for {room}"
                )
            step, before, began = 0, 0.0, False
            for section, ticks in pairs_of(words).tolist():
                now = float(ticks - zeros[block]) * tick
                if section:
                    name, part = names[section - 1]
                    if name == WAITS[1] and block >= first_idle:
                        name, part = WAITING_UPDATE, "wait"
                    found.append(Section(step, block, name, part, before, now))
                # where a block has images, the first phase marks the beginning of a step again
                step += section == 0 and not began
                before, began = now, section == 0
        return from_zero(found)

    def _zeros(self, marks: Array, waited: int, tick: float) -> list[int]:
        """Ticks of each block's clock at one and the same moment."""
        if not self.whole:
            return [int(marks[0][HEAD + 1])] * len(marks)
        if self.block.stamped:
            return zeros_by_shared_clock(marks, tick)
        return [zero_of(pairs_of(words), waited) for words in marks]


def named(layers: str, kernel: str, part: str) -> tuple[str, str]:
    """(name, part) of a section: `conv1 forward`, by the first of its layers."""
    first = layers.partition("+")[0]
    return (kernel if first == "batch" else f"{first} {kernel}", part)


def pairs_of(words: Array) -> Array:
    """The (section + 1, ticks) of each mark of a block, from its row of marks."""
    return words[HEAD : HEAD + 2 * int(words[0])].reshape(-1, 2).astype(np.int64)


def length_of_a_tick(marks: Array) -> float:
    """Seconds of a tick of the multiprocessors' clocks: the median of all blocks."""
    lengths = []
    for words in marks:
        pairs = pairs_of(words)
        begins = pairs[pairs[:, 0] == 0, 1]
        passed = float(begins[-1] - begins[0])
        if passed > 0:
            lengths.append(float(words[2] - words[1]) * 1e-9 / passed)
    return float(np.median(lengths))


def zero_of(pairs: Array, waited: int) -> int:
    """The ticks at which a block left the first barrier, which all blocks leave together."""
    left = pairs[pairs[:, 0] == waited + 1, 1]
    return int(left[0])


def zeros_by_shared_clock(marks: Array, tick: float) -> list[int]:
    """The ticks of each block at the moment when the first of them began its first step."""
    first = int(marks[:, 1].min())
    return [int(words[HEAD + 1]) - round((int(words[1]) - first) * 1e-9 / tick) for words in marks]


def from_zero(sections: list[Section]) -> list[Section]:
    """The sections with times that begin at 0."""
    first = min((section.begin for section in sections), default=0.0)
    return [s._replace(begin=s.begin - first, end=s.end - first) for s in sections]
