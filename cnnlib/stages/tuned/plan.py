"""A plan: how many images a block takes together and by which threads; and its source.

The source is numbers alone: a struct for each layer and one for the whole, and the list of the
layers' templates. The program is kernels/tuned/step.cuh.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Limits
from cnnlib.device.architecture import architecture_of
from cnnlib.engine import Options, Planned, Setup, Stage, options_of
from cnnlib.engine.shuffle import ROUNDS
from cnnlib.engine.source import Constant, declaration
from cnnlib.errors import Unsupported
from cnnlib.layers import DEFAULT_LOSS, Dense
from cnnlib.levels import channels_of
from cnnlib.stages.tuned.layout import SharedBuffer, Threads, lay_out, sectors
from cnnlib.stages.tuned.operator import Position, TunedFactory, TunedOperator

MAX_IMAGES = 16
"""Images that a block takes together, at most: two tiles of a product. More did not make a step
faster (docs/tuning/tuned.md).
"""
ONE_TEAM = Threads(256)
"""256 threads instead of 512 have twice the registers, and nothing is spilled: a step at batch 64
took 25.6 instead of 28.9 us on an H100 (docs/tuning).
"""
TWO_TEAMS = Threads(256, teams=2)
"""For blocks with more than two images: one team computes while the other waits. A step at batch
4096 took 340 instead of 396 us on an H100 (docs/tuning).
"""

ONE_TEAM_IMAGES = 4
"""Images of a block up to which a plan with one team may be measured beside one with two."""
PARTIALS_TILE = 64
"""Weights of a convolution that a block sums together: kernels/tuned/reduce.cuh."""

Products = Literal["tf32", "fp16"]
"""Floats that are split into two TF32 each time that they are multiplied, or planes of FP16 that
are split once (kernels/planes.cuh) where the convolution fits them.
"""


@dataclass(frozen=True)
class PersistentOptions(Options):
    """What a variant of the stage can leave out, to see what it is worth."""

    two_teams: bool = True
    """Whether blocks with more than two images have two teams."""
    max_images: int = MAX_IMAGES
    """Images that a block takes together, at most; a power of two."""
    few_images: int = 4
    """Images of a block up to which dense layers whose weights are in shared memory multiply one
    weight after another, and not matrices.
    """
    bulk_copies: bool = True
    """Whether weights arrive by the copy engine of a GPU that has one, and not by all threads."""
    products: tuple[Products, ...] = ("fp16", "tf32")
    """Of what convolutions' products may be made, the one that is taken unless another one is
    measured to be faster first.
    """
    stamped: bool = True
    """Whether blocks hand each other numbers with the step's stamp (kernels/tuned/stamps.cuh), and
    wait at no barrier of the grid, where the network allows it and enough blocks have no image: as
    many as there are tiles of convolutions' gradients.
    """
    threads_read_l2: bool = True
    """Whether the dense products of few images, by weights that stay in device memory, are made by
    threads, which ask for many weights at once, and not by tensor cores: a step of simard at batch
    64 took 28 instead of 65 us on an H100.
    """


@dataclass(frozen=True)
class Objective:
    """What the source is made for besides the network and the batch."""

    loss: str = DEFAULT_LOSS
    """A name of cnnlib.layers.LOSSES."""
    weight_decay: float = 0.0

    @classmethod
    def of(cls, setup: Setup) -> "Objective":
        return cls(setup.loss, setup.weight_decay)


USUAL = Objective()


class BlockPlan:
    """The operators of a network in order and the layout of a block's shared memory.

    A block takes `images` together where the network lets it. Raises Unsupported where a network's
    maps and convolution weights do not fit a block.
    """

    def __init__(
        self,
        stage: Stage[TunedFactory],
        planned: Sequence[Planned[TunedFactory]],
        shared_bytes: int,
        images: int = 1,
        threads: Threads = ONE_TEAM,
        objective: Objective = USUAL,
        products: Products = "tf32",
        idle: int = 0,
    ) -> None:
        """`idle`: how many blocks have no image of a batch."""
        self.objective, self.products = objective, products
        self.options = options_of(stage, PersistentOptions)
        stage = replace(stage, options=replace(self.options, products=(products,)))
        self.network = network = planned[0].network
        dense = any(isinstance(layer, Dense) for layer in network.layers)
        self.images = images if dense else 1
        self.threads = threads if self.images % threads.teams == 0 else replace(threads, teams=1)
        self.operators: list[TunedOperator] = [
            p.operator(p, stage, self.threads, self.images) for p in planned
        ]
        for before, after in itertools.pairwise(self.operators):
            after.follow(before)
        self.layout = lay_out(
            [operator.needs for operator in self.operators],
            [*(operator.source_size for operator in self.operators), math.prod(network.shapes[-1])],
            self.threads,
            self.images,
            shared_bytes,
        )
        if self.layout.bytes > shared_bytes:
            convolved = sum(o.parameters for o in self.operators if o.partials)
            raise Unsupported(
                f"stage '{stage.name}' keeps an image's maps and the weights of convolutions in "
                f"shared memory: those of network '{network.name}' ({convolved:,} weights, "
                f"{sum(map(math.prod, network.shapes)):,} numbers in its maps) need "
                f"{self.layout.bytes:,} bytes, and a block may have {shared_bytes:,}"
            )
        self.positions: list[Position] = []
        self.trace = self.partials = 0
        """Floats of an image's trace, and of a block's partial sums."""
        for index, operator in enumerate(self.operators):
            self.positions.append(Position(index, self.trace, self.partials))
            self.trace += operator.trace
            self.partials += operator.partials
        self.trace = max(sectors(1), self.trace)
        self.stamped = (
            self.options.stamped
            and idle >= sum(ceil_div(o.partials, PARTIALS_TILE) for o in self.operators)
            and self.images == self.threads.teams == 1
            and self.partials > 0
            and all(o.copied_by_one_warp(self.layout) for o in self.operators)
        )
        """Whether a launch has no barriers of the grid: see PersistentOptions.stamped."""

    @property
    def weights_in_shared(self) -> list[str]:
        """Labels of the operators whose weights are in shared memory."""
        return [o.label for o in self.operators if o.label in self.layout.weights]

    @property
    def reads_l2(self) -> bool:
        """Whether threads can make a product of weights that stay in device memory."""
        return any(operator.may_read_l2(self.layout) for operator in self.operators)

    @property
    def facts(self) -> dict[str, object]:
        """Its sizes, as run.json names them."""
        return {
            "images_a_block": self.images,
            "threads": self.threads.block,
            "teams": self.threads.teams,
            "shared_bytes": self.layout.bytes,
            "weights_on_chip": self.weights_in_shared,
            "products": self.products,
            "few_images": self.options.few_images,
            "stamped": self.stamped,
            **({"threads_read_l2": self.options.threads_read_l2} if self.reads_l2 else {}),
        }

    def source(self, timeline: bool = False) -> str:
        """The translation unit; with `timeline`, that of kernels whose blocks read the clock."""
        layout, network = self.layout, self.network
        config: dict[str, Constant] = {
            "IMAGES": self.images,
            "IMAGE_SIZE": math.prod(network.input_shape),
            "CHANNELS": channels_of(network.input_shape),
            "WIDTH": network.input_shape[-1],
            "BORDER_ROWS": self.operators[0].border[0],
            "BORDER_COLUMNS": self.operators[0].border[1],
            "CLASSES": network.classes,
            "BYTES": self.operators[0].takes_bytes,
            "PLANES": self.operators[0].takes_planes,
            "KEPT": layout.kept_floats,
            "SLOTS": layout.slots,
            "TRACE": self.trace,
            "PARTIALS": self.partials,
            "SHARED_BYTES": layout.bytes,
            "SHUFFLE_ROUNDS": ROUNDS,
            "LOSS": f"tuned::{self.objective.loss.upper()}",
            "WEIGHT_DECAY": float(self.objective.weight_decay),
        }
        last_errors = layout.errors[-1]
        buffers = {
            "Image": layout.maps[0],
            "Logits": layout.maps[-1],
            "Errors": last_errors,
            "Labels": SharedBuffer(layout.labels),
            "BulkCopies": SharedBuffer(layout.bulk_copies),
        }
        threads = f"::Threads<{self.threads.block}, {self.threads.teams}>"
        text = [
            f"// Network {network.name}, {self.images} images a block.",
            *["#define NO_BULK_COPIES"] * (not self.options.bulk_copies),
            '#include "tuned/timeline.cuh"' if timeline else '#include "tuned/step.cuh"',
            "",
            *struct("plan", config, buffers, [f"using Threads = {threads};"]),
        ]
        for operator, position in zip(self.operators, self.positions, strict=True):
            text.append(f"// {operator.planned.name}")
            text += struct(
                operator.label,
                operator.config(layout, position),
                operator.buffers(layout, position),
            )
        first = next((i for i, o in enumerate(self.operators) if o.needs.per_batch), None)
        per_batch = [] if first is None else self.operators[first:]
        kind = "STAMPED_" * self.stamped + "TIMELINE_" * timeline
        text += [
            f"using PerImage = tuned::PerImage<{templates(self.operators[:first])}>;",
            f"using PerBatch = tuned::PerBatch<{templates(per_batch)}>;",
            "using Net = tuned::Network<plan, PerImage, PerBatch>;",
            f"TUNED_{kind}ENTRY_POINTS(Net)",
            "",
        ]
        return "\n".join(text)


def templates(operators: Sequence[TunedOperator]) -> str:
    """Template arguments: the class template of each operator, with its struct."""
    return ",\n    ".join(f"tuned::{o.template}<{o.label}, plan::Threads>" for o in operators)


def struct(
    name: str,
    config: Mapping[str, Constant],
    buffers: Mapping[str, SharedBuffer | None],
    more: Sequence[str] = (),
) -> Iterator[str]:
    """Lines of a struct of constants and of buffers."""
    yield f"struct {name} {{"
    yield from (f"  {line}" for line in more)
    flags = {name: str(value).lower() for name, value in config.items() if isinstance(value, bool)}
    floats = {name: f"{value!r}f" for name, value in config.items() if isinstance(value, float)}
    numbers = {
        name: value.name if isinstance(value, IntEnum) else value
        for name, value in config.items()
        if name not in flags and name not in floats
    }
    yield declaration("int", numbers)
    if floats:
        yield declaration("float", floats)
    if flags:
        yield declaration("bool", flags)
    for key, buffer in buffers.items():
        yield f"  using {key} = {buffer_of(buffer)};"
    yield "};"
    yield ""


def buffer_of(buffer: SharedBuffer | None) -> str:
    """A buffer as C++ writes its type."""
    if buffer is None:
        return "tuned::NoBuffer"
    numbers = [buffer.offset, buffer.pitch, buffer.slots]
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    return f"tuned::SharedBuffer<{', '.join(map(str, numbers))}>"


def choose(
    stage: Stage[TunedFactory],
    planned: Sequence[Planned[TunedFactory]],
    batch_size: int,
    device: Limits,
    objective: Objective = USUAL,
) -> BlockPlan:
    """The plan for a batch size: how many images a block takes together, and in how many teams.

    All that a block has, up to MAX_IMAGES; fewer where their maps do not fit its shared memory.
    """
    options = options_of(stage, PersistentOptions)
    own = ceil_div(batch_size, device.multiprocessors)
    images = min(options.max_images, 2 ** math.ceil(math.log2(own)))
    while True:
        threads = threads_for(images, options, device)
        for products in options.products:
            given = stage, planned, device.shared_bytes, images, threads, objective, products
            try:
                return BlockPlan(*given, idle=device.multiprocessors - batch_size)
            except Unsupported:
                if images == 1 and products == options.products[-1]:
                    raise
        images //= 2


def candidates(
    stage: Stage[TunedFactory],
    planned: Sequence[Planned[TunedFactory]],
    batch_size: int,
    device: Limits,
    objective: Objective = USUAL,
) -> list[BlockPlan]:
    """Plans worth measuring, all different: first that of `choose`; then it with other products,
    with half as many images together, with the other way of threads_read_l2 where more than two
    images make it a question, and one of few images in one team. They are few: a GPU's compiler
    takes some ten seconds for each.
    """
    first = choose(stage, planned, batch_size, device, objective)
    options = options_of(stage, PersistentOptions)
    wanted = [(stage, first.images, products) for products in options.products]
    wanted.append((stage, first.images // 2, first.products))
    if first.reads_l2 and first.images > 2:
        other_way = replace(options, threads_read_l2=not options.threads_read_l2)
        wanted.append((replace(stage, options=other_way), first.images, first.products))
    found = {first.source(): first}
    for variant, images, products in wanted:
        if images:
            threads = threads_for(images, options, device)
            given = variant, planned, device.shared_bytes, images, threads, objective, products
            with suppress(Unsupported):
                other = BlockPlan(*given, idle=device.multiprocessors - batch_size)
                found.setdefault(other.source(), other)
    if first.images <= ONE_TEAM_IMAGES:
        most = min(options.max_images, ONE_TEAM_IMAGES)
        one_team = replace(stage, options=replace(options, two_teams=False, max_images=most))
        other = choose(one_team, planned, batch_size, device, objective)
        found.setdefault(other.source(), other)
    return list(found.values())


def threads_for(images: int, options: PersistentOptions, device: Limits) -> Threads:
    """The threads of a block that takes so many images together."""
    threads = TWO_TEAMS if images > 2 and options.two_teams else ONE_TEAM
    return replace(threads, gpu=architecture_of(device))
