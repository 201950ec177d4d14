"""Where everything lies in a block's shared memory.

`lay_out` is a function of what the layers need, the threads and the limits of the device; nothing
changes after it. Three kinds of arrays share the memory: those of the images that a block works on,
those of the end of the first phase and of the second phase, which lie over them, and at the end
what no phase may touch.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from cnnlib.arithmetic import ceil_div
from cnnlib.device.architecture import H100, LANES, SECTOR_FLOATS, Architecture
from cnnlib.network import FLOAT

ALIGNMENT = 4
"""Floats: arrays in shared memory begin at multiples of it, and are copied four at once."""
SLOTS_PER_TEAM = 2
"""Images whose maps a team has in shared memory where a block takes several together, at least: one
comes or goes while the other is worked on.
"""
MANY_LAYERS = 8
"""Beyond so many layers, not every choice of those whose weights stay in device memory is tried:
the largest ones stay there.
"""
MIN_STAGES, MAX_STAGES = 2, 8
"""Bounds of the cp.async pipeline depth in the gradient reduction; even."""


@dataclass(frozen=True)
class Threads:
    """How a block's threads are used; a multiprocessor has one block."""

    block: int
    teams: int = 1
    """Teams of equal size; each takes images of its own through the convolutions."""
    gpu: Architecture = H100
    """Whose cores the threads share; by default the one on which their numbers were chosen."""

    @property
    def team(self) -> int:
        """Threads of a team."""
        return self.block // self.teams

    @property
    def team_warps(self) -> int:
        return self.team // LANES

    @property
    def block_warps(self) -> int:
        return self.block // LANES


def aligned(floats: int) -> int:
    """The next multiple of ALIGNMENT."""
    return ceil_div(floats, ALIGNMENT) * ALIGNMENT


def sectors(floats: int) -> int:
    """The next multiple of what device memory moves at once."""
    return ceil_div(floats, SECTOR_FLOATS) * SECTOR_FLOATS


def row_pitch(floats: int) -> int:
    """Floats from a row of at least so many to the next, so that rows lie in different banks.

    Rows are read four floats wide eight at a time, or eight floats wide four at a time; both are
    free of conflicts where rows begin an odd multiple of eight banks apart.
    """
    wide = 4 * ALIGNMENT
    return ceil_div(aligned(floats) - wide // 2, wide) * wide + wide // 2


@dataclass(frozen=True)
class SharedBuffer:
    """An array in shared memory: tuned::SharedBuffer of kernels/tuned/context.cuh, in floats."""

    offset: int
    pitch: int = 0
    """Floats from one image's part to the next one's; 0 where a block has one image at a time."""
    slots: int = 0
    """Images use so many parts by turns; 0: each has its own."""


@dataclass(frozen=True)
class Region:
    """A named part of shared memory, in floats."""

    name: str
    offset: int
    floats: int
    phase: str
    """When it is in use: images, gradient, update or always."""


class SharedArena:
    """Shared memory that is given out from the beginning."""

    def __init__(self, phase: str) -> None:
        self.size = 0
        """Floats given out so far."""
        self.regions: list[Region] = []
        self._phase = phase

    def take(self, name: str, floats: int, count: int = 1) -> int:
        """The offset of `count` arrays of `floats` each, one behind the other."""
        offset = self.size
        self.size += aligned(floats) * count
        if floats and count:
            self.regions.append(Region(name, offset, aligned(floats) * count, self._phase))
        return offset


@dataclass(frozen=True)
class Needs:
    """What one operator needs in shared memory, in floats."""

    label: str
    parameters: int
    per_batch: bool = False
    """Whether it takes all images of a block together, as do all operators behind it."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Name -> floats of what an image leaves forward and backward needs."""
    source: int = 0
    """Floats of its source where they are others than its numbers: planes, over which the errors
    by the source come to lie. 0: the source is floats.
    """
    weights: int = 0
    """Floats of its weights as they are used."""
    optional: bool = False
    """Whether its weights may stay in device memory."""
    lead: int = 0
    """Floats in front of its parameters, which are copied from the 16-byte boundary before them."""
    raw: int = 0
    """Floats of its parameters as they are copied, from a 16-byte boundary to another; or 0."""
    raw_is_used: bool = False
    """Whether it uses them as they come, where they come."""
    scratch: int = 0
    """Floats that nothing else uses while it works: for each team, or per_batch for the block."""
    staged: int = 0
    """Floats for its gradient when no image is left."""
    stage: int = 0
    """Floats of one stage of its pipeline in the second phase, all warps'."""
    tables: int = 0
    """Floats of what is made when a launch begins and stays until it ends."""


@dataclass(frozen=True)
class SharedLayout:
    """The frozen layout; offsets and sizes in floats."""

    floats: int
    """All that a block needs."""
    maps: tuple[SharedBuffer, ...]
    """The source of each operator, and the target of the last."""
    errors: tuple[SharedBuffer | None, ...]
    """The derivatives by each of these; nothing needs those by the image."""
    kept: Mapping[str, Mapping[str, SharedBuffer]]
    """What Needs.kept names, by label."""
    kept_floats: int
    """Floats kept of one image before the first dense layer, maps included. They come first."""
    slots: int
    """Places of that size, used by turns."""
    weights: Mapping[str, int]
    """Offset of the weights that lie in shared memory, by label."""
    raw_weights: Mapping[str, int]
    """Where parameters arrive that are converted first, by label."""
    tables: Mapping[str, int]
    staged: Mapping[str, int]
    image_scratch: SharedBuffer
    """Scratch of operators that take one image at a time."""
    batch_scratch: SharedBuffer
    """Scratch of operators that take a block's images together; it is the same memory."""
    scratch_floats: tuple[int, int]
    """Floats of image_scratch, for one team, and of batch_scratch."""
    labels: int
    bulk_copies: int
    """The barrier of bulk copies."""
    stages: int
    """Depth of the pipelines in the second phase."""
    update_floats: int
    """Floats that the second phase may use, from 0 on."""
    regions: tuple[Region, ...]
    """All of these by name, for people."""

    @property
    def bytes(self) -> int:
        return self.floats * FLOAT


def lay_out(
    needs: Sequence[Needs], sizes: Sequence[int], threads: Threads, images: int, shared_bytes: int
) -> SharedLayout:
    """The layout of a block that takes `images` together and may have `shared_bytes`.

    sizes: floats of the source of each operator, and of the target of the last. As many weights
    are in shared memory as fit: those layers give way whose weights are the fewest that do, and
    then, for one image, room in scratch for parameters that are used where they come. If it does
    not fit even so, the layout is returned all the same, and its `bytes` say how much it lacks.
    What is left has the maps of more images, which then need not come and go.
    """
    fewest = min(SLOTS_PER_TEAM * threads.teams, images)
    ways = [(in_global, False) for in_global in _give_ways(needs)]
    if images == 1:
        ways.append((ways[-1][0], True))
    for in_global, tight in ways:
        given = needs, sizes, threads, images, shared_bytes, in_global, tight
        layout = _lay_out(*given, fewest)
        if layout.bytes <= shared_bytes:
            roomy = (_lay_out(*given, slots) for slots in range(images, fewest, -threads.teams))
            return next((more for more in roomy if more.bytes <= shared_bytes), layout)
    return layout


def _give_ways(needs: Sequence[Needs]) -> Iterator[frozenset[str]]:
    """Labels of the operators whose weights stay in device memory: none, then ever more weights."""
    optional = {n.label: n.parameters for n in needs if n.optional}
    if len(optional) > MANY_LAYERS:
        largest = sorted(optional, key=lambda label: -optional[label])
        yield from (frozenset(largest[:count]) for count in range(len(largest) + 1))
        return
    away = itertools.chain.from_iterable(
        itertools.combinations(optional, count) for count in range(len(optional) + 1)
    )
    yield from map(frozenset, sorted(away, key=lambda labels: sum(optional[x] for x in labels)))


def _lay_out(
    needs: Sequence[Needs],
    sizes: Sequence[int],
    threads: Threads,
    images: int,
    shared_bytes: int,
    in_global: frozenset[str],
    tight: bool,
    slots: int,
) -> SharedLayout:
    arena, teams = SharedArena("images"), threads.teams
    first = next((i for i, n in enumerate(needs) if n.per_batch), len(needs))

    # What is kept of an image comes first, as many times as there are slots.
    one_image = SharedArena("images")
    kept_maps = [
        one_image.take(f"map {i}", n.source or size)
        for i, (n, size) in enumerate(zip(needs[:first], sizes, strict=False))
    ]
    kept_offsets = {
        n.label: {name: one_image.take(f"{n.label} {name}", size) for name, size in n.kept.items()}
        for n in needs[:first]
    }
    turn = one_image.size if slots > 1 else 0

    def in_slots(offset: int) -> SharedBuffer:
        return SharedBuffer(offset, turn, slots)

    for slot in range(slots):
        for region in one_image.regions:
            name = f"{region.name}, slot {slot}" if slots > 1 else region.name
            arena.take(name, region.floats)

    def by_image(name: str, size: int) -> SharedBuffer:
        pitch = row_pitch(size)
        return SharedBuffer(arena.take(name, pitch * images), pitch)

    def by_team(name: str, size: int) -> SharedBuffer:
        offset = arena.take(name, size, teams)
        return SharedBuffer(offset, aligned(size) if teams > 1 else 0, teams)

    maps = [in_slots(offset) for offset in kept_maps]
    maps += [by_image(f"map {i}", sizes[i]) for i in range(first, len(sizes))]
    errors: list[SharedBuffer | None] = [None]
    # The planes of a source have been used when its errors come, and the layer before needs none.
    errors += [
        maps[i] if needs[i].source else by_team(f"errors {i}", sizes[i]) for i in range(1, first)
    ]
    errors += [by_image(f"errors {i}", sizes[i]) for i in range(max(1, first), len(sizes))]
    labels = arena.take("labels", images)
    kept = {
        label: {name: in_slots(offset) for name, offset in offsets.items()}
        for label, offsets in kept_offsets.items()
    }
    weights = {}
    for i, n in enumerate(needs):
        if i >= first:
            kept[n.label] = {
                name: SharedBuffer(arena.take(f"{n.label} {name}", size))
                for name, size in n.kept.items()
            }
        if n.weights and n.label not in in_global:
            lead = n.lead if n.raw_is_used else 0
            weights[n.label] = arena.take(f"{n.label} weights", lead + n.weights) + lead

    image_scratch = aligned(max((n.scratch for n in needs[:first]), default=0))
    # Parameters that are converted arrive there too, before any image does.
    converted = [n for n in needs if n.raw and not n.raw_is_used]
    # The others need no room there, and have it only in the layouts that were measured with it.
    arriving = sum(n.raw for n in (converted if tight else needs))
    batch_scratch = max(arriving, image_scratch * teams, *(n.scratch for n in needs))
    scratch = arena.take("scratch", batch_scratch)
    ends = itertools.accumulate((n.raw for n in converted), initial=scratch)
    raw_weights = {n.label: offset + n.lead for n, offset in zip(converted, ends, strict=False)}

    # When no image is left, and in the second phase, arrays lie over all of these.
    gradient = SharedArena("gradient")
    staged = {n.label: gradient.take(f"{n.label} gradient", n.staged) for n in needs}

    def update_floats(stages: int) -> int:
        return aligned(max(threads.block, *(n.stage * stages for n in needs)))

    always = SharedArena("always")
    always.size = max(arena.size, gradient.size)
    resident = ALIGNMENT + sum(aligned(n.tables) for n in needs)
    stages = MIN_STAGES
    while stages < MAX_STAGES and (update_floats(stages + 2) + resident) * FLOAT <= shared_bytes:
        stages += 2
    always.size = max(always.size, update_floats(stages))
    bulk_copies = always.take("barrier of bulk copies", ALIGNMENT)
    tables = {n.label: always.take(f"{n.label} term offsets", n.tables) for n in needs}
    update = Region("pipelines of the update", 0, update_floats(stages), "update")
    return SharedLayout(
        floats=always.size,
        maps=tuple(maps),
        errors=tuple(errors),
        kept=MappingProxyType(kept),
        kept_floats=one_image.size,
        slots=slots,
        weights=MappingProxyType(weights),
        raw_weights=MappingProxyType(raw_weights),
        tables=MappingProxyType(tables),
        staged=MappingProxyType(staged),
        image_scratch=SharedBuffer(scratch, image_scratch if teams > 1 else 0, teams),
        batch_scratch=SharedBuffer(scratch),
        scratch_floats=(image_scratch, batch_scratch),
        labels=labels,
        bulk_copies=bulk_copies,
        stages=stages,
        update_floats=update_floats(stages),
        regions=(*arena.regions, *gradient.regions, update, *always.regions),
    )
