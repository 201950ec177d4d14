"""What a stage is, which of its operators serves which layers, and what every engine can do.

A Stage is a frozen record of choices, so that the differences between stages read as text. An
Engine trains one network by one stage at one batch size.
"""

import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cnnlib.device import Device, Limits
from cnnlib.engine.learning_rate import Schedule
from cnnlib.engine.shuffle import Shuffle
from cnnlib.errors import Unsupported
from cnnlib.layers import Array, Layer, Shape
from cnnlib.network import FLOAT, Arithmetic, Network

Bytes = NDArray[np.uint8]
Order = NDArray[np.integer[Any]]
Part = Literal["input", "forward", "loss", "backward", "update", "compared"]
"""Of a training step's work."""


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
    """Of a schedule of one cycle; None: the learning rate is constant."""
    mean: float = 0.0
    deviation: float = 1.0
    resident_images: int | Literal["auto"] = "auto"
    tune: bool = False
    """Whether an engine that has several ways to train chooses among them by measuring."""
    device_kind: str = "cpu"
    """Kind of device, cpu or cuda, for engines of libraries that find theirs themselves."""
    labels: str = ""
    """A digest of the training labels, by which a checkpoint knows its data; "" for none."""

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.learning_rate, self.warmup)


@dataclass(frozen=True)
class Stage:
    """One rung of the ladder.

    `operators` maps a run of layer kinds to the operator that serves it; the plan takes the longest
    match, so fusing is a longer key.
    """

    name: str
    title: str
    """For figures and tables."""
    change: str
    """What is different from the stage before, in one sentence."""
    runs_on: Literal["cpu", "cuda", "any"]
    """cuda: by kernels, which are emulated where there is no GPU. any: by a library that takes a
    GPU where it finds one.
    """
    engine: type["Engine"]
    operators: Mapping[tuple[type[Layer], ...], Any] = field(default_factory=dict)
    dtype: DTypeLike = np.float32
    rounding: float | None = None
    """Of a factor of a product, relative, where it is coarser than dtype's."""
    slack: float = 1.0
    """How many times the bound of a sum as it stands its rounding errors may be."""
    conv_weight_slack: float | None = None
    """The same for gradients of convolutions' weights, where they are less exact than the rest."""
    repeatable: bool = True
    """Whether the same steps end with the same bits, however they are split into calls of `train`.

    A stage that says no, as one whose sums have no fixed order, gives Engine.step_losses.
    """
    threads: int | None = None
    """CPU threads; None: all cores."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further choices that the stage's own operators read, for variants of one stage."""


@dataclass(frozen=True)
class Planned:
    """Operator `operator` serves `network.layers[start:stop]`."""

    operator: Any
    network: Network
    start: int
    stop: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.network.layers[self.start : self.stop]

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
        """The first operator's source is the images: nobody wants their error."""
        return self.start == 0


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


def plan(stage: Stage, network: Network) -> tuple[Planned, ...]:
    """Cover the network's layers from the input on, always by the longest run the stage knows.

    Raises Unsupported naming the stage, the layer and what the stage can do.
    """
    planned: list[Planned] = []
    start = 0
    while start < len(network.layers):
        kinds = tuple(type(layer) for layer in network.layers[start:])
        runs = [key for key in stage.operators if kinds[: len(key)] == key]
        if not runs:
            known = ", ".join("+".join(layer.kind for layer in key) for key in stage.operators)
            raise Unsupported(
                f"stage '{stage.name}' has no operator for {network.layer_names[start]} of "
                f"network '{network.name}'; it knows: {known or 'nothing'}"
            )
        run = max(runs, key=len)
        planned.append(Planned(stage.operators[run], network, start, start + len(run)))
        start += len(run)
    return tuple(planned)


def name_of(operator: Any) -> str:
    """What provenance calls an operator: its class, or a function's name, which may be given."""
    if isinstance(operator, str):
        return operator
    return str(getattr(operator, "__name__", type(operator).__name__))


class KernelTime(NamedTuple):
    """One kernel of a training step, timed on its own."""

    layer: str
    kernel: str
    layers: str
    """All the layers that its operator serves, joined by +."""
    part: Part
    """compared: of none, it is only timed."""
    flops: float
    """The least that this part of these layers needs for a batch; its kernels share it."""
    bytes: float
    """Likewise: what must come in and go out once."""
    grid: int
    """Blocks; 0 where there are none."""
    launches: int
    """In one step; 0 for a kernel that is timed for comparison only."""
    seconds: float
    """Of one launch: the mean of several in a row."""


PROFILED_SECONDS = 0.1
"""Training that a profile of a CPU stage looks at, at least."""


def profile_operators(
    setup: Setup,
    planned: Sequence[Planned],
    operators: Sequence[Any],
    step: Callable[[], object],
    update: Callable[[], object],
) -> list[KernelTime]:
    """KernelTimes of operators with methods `forward` and `backward`, one for each of them.

    `step` computes the gradient of one batch by the operators, `update` goes down it. What the step
    does besides (choosing images, the loss, adding up) stands as the loss. All times are means.
    """
    seconds: dict[tuple[int, Part], float] = defaultdict(float)

    def watch(call: Callable[..., Any], index: int, part: Part) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments)
            seconds[index, part] += time.perf_counter() - began
            return result

        return timed

    parts: tuple[Part, Part] = ("forward", "backward")
    for index, operator in enumerate(operators):
        for part in parts:
            setattr(operator, part, watch(getattr(operator, part), index, part))
    rounds, began = 0, time.perf_counter()
    try:
        while not rounds or time.perf_counter() - began < PROFILED_SECONDS:
            step()
            rounds += 1
    finally:
        for operator in operators:
            for part in parts:
                delattr(operator, part)
    rest = time.perf_counter() - began - sum(seconds.values())
    began = time.perf_counter()
    for _ in range(rounds):
        update()
    updating = time.perf_counter() - began

    def row(layers: str, part: Part, least: Arithmetic, total: float) -> KernelTime:
        layer = layers.partition("+")[0]
        return KernelTime(layer, "numpy", layers, part, *least, 0, 1, total / rounds)

    batch = setup.batch_size
    rows = [
        row(planned[i].name, part, planned[i].arithmetic(part, batch), total)
        for (i, part), total in seconds.items()
    ]
    return [
        *rows,
        row("batch", "loss", batch_arithmetic(setup, "loss"), rest),
        row("batch", "update", batch_arithmetic(setup, "update"), updating),
    ]


class Engine(ABC):
    """Trains `setup.network` by `stage`: mini-batches of `setup.batch_size`, plain SGD.

    The first images of `order` make the first batch, and so on; what is left over is dropped. The
    gradient is that of the mean loss over the batch. After `load`, `train` is all that is timed.
    """

    image_by_image: ClassVar[bool] = False
    """Whether the time per image is the same at every batch size, because images do not meet."""
    event_seconds: float = math.nan
    """The last `train` by the device's own events; nan where there are none."""
    step_losses: Array | None = None
    """Mean loss of each step of the last `train`, (steps,): what stages have that do not repeat."""

    def __init__(self, stage: Stage, setup: Setup, device: Device | None = None) -> None:
        self.stage = stage
        self.setup = setup
        self.network = setup.network
        self.plan = plan(stage, setup.network)
        self.operators: Sequence[Any] = [p.operator for p in self.plan]
        """What serves the parts of the plan; an engine that makes objects of them keeps these."""

    @classmethod
    def operators_on(cls, stage: Stage, setup: Setup, device: Limits | None) -> Sequence[Any]:
        """The operators that an engine made of these arguments would have, or their classes.

        Nothing is compiled and no memory is taken, so that a user can ask before a sweep. Raises
        Unsupported where the engine would: what no stage takes is never given to another one.
        """
        return [p.operator for p in plan(stage, setup.network)]

    @classmethod
    def source_on(cls, stage: Stage, setup: Setup, device: Limits) -> str:
        """The CUDA source that an engine made of these arguments would compile.

        No engine is made and nothing is compiled. Raises Unsupported where operators_on does, and
        for a stage that generates none.
        """
        raise Unsupported(f"stage '{stage.name}' has no generated source")

    @property
    def served(self) -> list[str]:
        """`layers: operator` for every operator that this engine trains with."""
        return [f"{p.name}: {name_of(o)}" for p, o in zip(self.plan, self.operators, strict=True)]

    @property
    def choices(self) -> dict[str, Any]:
        """What this engine has decided for itself, for provenance."""
        return {}

    @abstractmethod
    def load(self, images: Bytes, labels: Bytes) -> None:
        """Make images (N, C, H, W) and labels (N,) the training set; not timed."""

    @abstractmethod
    def train(self, order: Order, rates: Array | None = None) -> float:
        """Train on the batches of `order` (indices into the training set); mean loss of them.

        `rates` are the learning rates of the steps, (steps,); setup.learning_rate if not given.
        Returns when the last update is visible to the host.
        """

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        """`train` on all whole batches of an epoch; its order is drawn here, wherever that is."""
        size = self.setup.batch_size
        return self.train(shuffle.indices()[: len(shuffle) // size * size], rates)

    @property
    def unit(self) -> int:
        """Images that are trained on together: a training can be interrupted between two units."""
        return self.setup.batch_size

    def train_units(self, order: Order, rates: Array | None = None) -> float:
        """Train on whole units; the sum of the mean losses of the steps that ended in it.

        `rates` are those of these steps.
        """
        return self.train(order, rates) * (len(order) // self.setup.batch_size)

    def rates_of(self, steps: int, rates: Array | None) -> Array:
        """`rates`, or those of a constant schedule: (steps,)."""
        return np.full(steps, self.setup.learning_rate) if rates is None else rates

    @property
    def unfinished(self) -> Array:
        """What units have left of a step that has not ended; nothing where a unit is a step."""
        return np.zeros(0, self.stage.dtype)

    @unfinished.setter
    def unfinished(self, vector: Array) -> None:
        if len(vector):
            raise ValueError("steps of this engine are done whole")

    @abstractmethod
    def gradient(self, images: Bytes, labels: Bytes) -> tuple[float, Array]:
        """(mean loss, flat gradient) over up to batch_size images, parameters unchanged."""

    @abstractmethod
    def backward(self, images: Bytes, output_error: Array) -> Array:
        """Flat gradient for a given derivative by the logits (n, classes), n up to batch_size."""

    @abstractmethod
    def logits(self, images: Bytes) -> Array:
        """(n, classes) for any number n of images."""

    @property
    @abstractmethod
    def parameters(self) -> Array:
        """Copy of the flat parameter vector."""

    @parameters.setter
    @abstractmethod
    def parameters(self, vector: Array) -> None: ...

    @property
    @abstractmethod
    def velocity(self) -> Array:
        """Copy of the momentum's flat vector (zeros at the start); with the parameters and the
        position in the order it is the whole state of a training.
        """

    @velocity.setter
    @abstractmethod
    def velocity(self, vector: Array) -> None: ...

    def time_update(self) -> float:
        """Seconds of one update alone, for image-by-image engines; the parameters may change."""
        raise NotImplementedError

    def profile(self) -> list[KernelTime]:
        """The kernels of one training step, or what stands for them on a CPU.

        Needs `load`. Parameters and velocity are the same afterwards.
        """
        return []

    def close(self) -> None:
        """Give back what the engine holds on its device."""

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
