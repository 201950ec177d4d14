"""What a stage is, which of its operators serves which layers, and what is to be trained.

A Stage is a frozen record of choices, so that the differences between stages read as text.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from typing_extensions import TypeVar

from cnnlib.engine.learning_rate import Schedule
from cnnlib.errors import Unsupported
from cnnlib.layers import DEFAULT_LOSS, Array, Dropout, Layer, Loss, Shape, find_loss
from cnnlib.levels import Level, channels_of
from cnnlib.network import DEFAULT_SCHEME, FLOAT, Arithmetic, Network

if TYPE_CHECKING:
    from cnnlib.engine.base import Engine

Bytes = NDArray[np.uint8]
Order = NDArray[np.integer[Any]]
Part = Literal["input", "forward", "loss", "backward", "update", "compared"]
"""A part of a training step; `compared` is work that no step does, timed beside it."""

Op = TypeVar("Op", default=Any)
"""What a stage's record holds for a run of layers: a class or a function that makes its engine's
operators. Every engine says which, so that a record that pairs the wrong ones is a type error.
`Stage`, `Engine` and `Planned` alone are those of any operators.
"""
L = TypeVar("L", bound=Layer)
Own = TypeVar("Own", bound="Options")
Factory = TypeVar("Factory")
Why = Callable[[Sequence[Layer], Shape], str]
"""Says of a run of layers, whose source has this shape, why an operator declines it; "" if not."""


@dataclass(frozen=True)
class Setup:
    """What is trained and how: all that an engine needs besides its stage.

    Images come as bytes; an engine computes with (byte - mean) / deviation.
    """

    network: Network
    batch_size: int
    learning_rate: float
    """The peak of a cycle, and the rate of every step where a training gives no others."""
    momentum: float = 0.0
    warmup: float | None = None
    """The rising share of a schedule of one cycle; None: the learning rate is constant."""
    mean: Level = 0.0
    """Of the bytes: one for all channels, or one of each."""
    deviation: Level = 1.0
    resident_images: int | Literal["auto"] = "auto"
    """Training images on the device at a time; auto: as many as half of its free memory holds."""
    tune: bool = False
    """Whether an engine that has several ways to train chooses among them by measuring."""
    device_kind: str = "cpu"
    """Kind of device, cpu or cuda, for engines of libraries that find theirs themselves."""
    labels: str = ""
    """A digest of the training labels, by which a checkpoint knows its data; "" for none."""
    loss: str = DEFAULT_LOSS
    """A name of cnnlib.layers.LOSSES."""
    weight_decay: float = 0.0
    """Share of the parameters that is added to their gradient, biases included."""
    initial_weights: str = DEFAULT_SCHEME
    """A name of cnnlib.network.SCHEMES."""
    seed: int = 0
    """The key of dropout's masks."""

    def __post_init__(self) -> None:
        channels = channels_of(self.network.input_shape)
        for name in ("mean", "deviation"):
            level = getattr(self, name)
            if isinstance(level, tuple) and len(level) != channels:
                raise ValueError(
                    f"images of network '{self.network.name}' have {channels} channels, and its "
                    f"{name} has {len(level)} numbers"
                )

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.learning_rate, self.warmup)

    @property
    def loss_function(self) -> Loss:
        return find_loss(self.loss)

    def mask(self, layer: int, step: int, image: int | Array) -> Array:
        """Dropout's mask at `layer` of the network in a step, for one image of its batch or many.

        (*shape,) or (n, *shape), bool.
        """
        dropout = self.network.layers[layer]
        if not isinstance(dropout, Dropout):
            raise TypeError(f"{self.network.layer_names[layer]} has no mask")
        return dropout.mask(self.network.shapes[layer], self.seed, step, layer, image)


@dataclass(frozen=True)
class Options:
    """Choices that only the stages of one engine have; such an engine derives its own class."""


@dataclass(frozen=True)
class Stage(Generic[Op]):
    """One rung of the ladder.

    `operators` maps a run of layer kinds to the operator that serves it; the plan takes the longest
    match, so fusing is a longer key.
    """

    name: str
    title: str
    """The name in figures and tables."""
    change: str
    """What is different from the previous stage, in one sentence."""
    runs_on: Literal["cpu", "cuda", "any"]
    """cuda: by kernels, which are emulated where there is no GPU. any: by a library that takes a
    GPU where it finds one.
    """
    engine: type["Engine[Op]"]
    operators: Mapping[tuple[type[Layer], ...], Op] = field(default_factory=dict)
    dtype: DTypeLike = np.float32
    rounding: float | None = None
    """Relative rounding of a factor of a product, where it is coarser than dtype's."""
    slack: float = 1.0
    """Multiple of the bound of a plain sum that the stage's rounding errors may reach."""
    conv_weight_slack: float | None = None
    """Further slack for gradients of convolutions' weights, where they are less exact."""
    repeatable: bool = True
    """Whether the same steps end with the same bits, however they are split into calls of `train`.

    A stage that says no, because its sums have no fixed order, provides Engine.step_losses.
    """
    threads: int | None = None
    """CPU threads; None: all cores."""
    after: str = ""
    """The stage of the ladder that this one improves on; "" for the first, and for peers."""
    color: str = ""
    """Its colour in figures, as "#0072b2"; "": one that its name picks."""
    marker: str = ""
    """Its mark in figures, one of Matplotlib's characters; "": one that its name picks."""
    options: Options | None = None
    """Choices that only this engine's stages have; None: the engine's defaults."""


def options_of(stage: Stage, kind: type[Own]) -> Own:
    """The options of a stage whose engine reads those of `kind`; the defaults if it gives none.

    Raises TypeError for options of another engine.
    """
    given = stage.options
    if given is None:
        return kind()
    if not isinstance(given, kind):
        raise TypeError(f"options of stage '{stage.name}' are {given!r}, not {kind.__name__}(...)")
    return given


@dataclass(frozen=True)
class Planned(Generic[Op]):
    """Operator `operator` serves `network.layers[start:stop]`."""

    operator: Op
    network: Network
    start: int
    stop: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.network.layers[self.start : self.stop]

    def find(self, kind: type[L]) -> L | None:
        """The first of the layers that is of this kind, if there is one."""
        return next((layer for layer in self.layers if isinstance(layer, kind)), None)

    def layer(self, kind: type[L]) -> L:
        """The first of the layers that is of this kind; TypeError if there is none."""
        found = self.find(kind)
        if found is None:
            raise TypeError(f"{self.name} has no layer of kind {kind.kind}")
        return found

    @property
    def name(self) -> str:
        """The names of the layers served, joined by +."""
        return "+".join(self.network.layer_names[self.start : self.stop])

    @property
    def source_shape(self) -> Shape:
        return self.network.shapes[self.start]

    @property
    def target_shape(self) -> Shape:
        return self.network.shapes[self.stop]

    def arithmetic(self, part: Part, batch: int) -> Arithmetic:
        """The least that going forward or backward over `batch` images takes."""
        count = self.network.forward_arithmetic
        if part == "backward":
            count = self.network.backward_arithmetic
        return count(self.start, self.stop, batch)

    @property
    def is_first(self) -> bool:
        """Whether the operator's source is the images, whose derivative is not needed."""
        return self.start == 0


def declining(why: Why) -> Callable[[Factory], Factory]:
    """A decorator: the operator declines layers for which `why` gives a reason."""

    def mark(operator: Factory) -> Factory:
        setattr(operator, "declines", staticmethod(why) if isinstance(operator, type) else why)  # noqa: B010
        return operator

    return mark


def choosing(chosen: Callable[[Planned], object]) -> Callable[[Factory], Factory]:
    """A decorator for a function that makes one of several operators: `chosen` says which."""

    def mark(operator: Factory) -> Factory:
        setattr(operator, "chosen", chosen)  # noqa: B010
        return operator

    return mark


def chosen_for(planned: Planned) -> object:
    """The operator's class, where a function that is marked by `choosing` makes it."""
    chosen = getattr(planned.operator, "chosen", None)
    return chosen(planned) if chosen else planned.operator


def plan(stage: Stage[Op], network: Network) -> tuple[Planned[Op], ...]:
    """Cover the network's layers from the input on, always by the longest run the stage serves.

    An operator may have a function `declines(layers, source_shape)`, which says in a few words why
    it cannot serve layers of the right kinds, and "" if it can; the plan then tries a shorter run.
    Raises Unsupported naming the stage, the layer and what the stage can do.
    """
    planned: list[Planned[Op]] = []
    start = 0
    while start < len(network.layers):
        chosen, reasons = _longest(stage, network, start)
        if chosen is None:
            known = ", ".join("+".join(layer.kind for layer in key) for key in stage.operators)
            why = "; ".join(reasons) or f"it knows: {known or 'nothing'}"
            raise Unsupported(
                f"stage '{stage.name}' has no operator for {network.layer_names[start]} of "
                f"network '{network.name}'; {why}"
            )
        planned.append(chosen)
        start = chosen.stop
    return tuple(planned)


def _longest(
    stage: Stage[Op], network: Network, start: int
) -> tuple[Planned[Op] | None, list[str]]:
    """The longest run from layer `start` on that an operator serves, and why others do not.

    A reason that several runs share is given once, for the shortest of them.
    """
    kinds = tuple(type(layer) for layer in network.layers[start:])
    runs = [key for key in stage.operators if kinds[: len(key)] == key]
    reasons: dict[str, str] = {}
    for run in sorted(runs, key=len, reverse=True):
        found = Planned(stage.operators[run], network, start, start + len(run))
        declines = getattr(found.operator, "declines", None)
        why = declines(found.layers, found.source_shape) if declines else ""
        if not why:
            return found, []
        reasons[why] = found.name
    return None, [f"{name}: {why}" for why, name in reasons.items()]


def batch_arithmetic(setup: Setup, part: Part) -> Arithmetic:
    """The least for what belongs to no layer: input (bytes to numbers), loss and update."""
    batch, network = setup.batch_size, setup.network
    if part == "update":
        return network.update_arithmetic(setup.momentum != 0)
    if part == "input":
        pixels = batch * math.prod(network.input_shape)
        return Arithmetic(2 * pixels, (1 + FLOAT) * pixels)
    # per class: subtract, exponential, sum, divide, subtract the label
    logits = batch * network.classes
    return Arithmetic(5 * logits, 2 * FLOAT * logits)


def name_of(operator: object) -> str:
    """What provenance calls an operator: its class, or a function's name, which may be given."""
    if isinstance(operator, str):
        return operator
    return str(getattr(operator, "__name__", type(operator).__name__))
