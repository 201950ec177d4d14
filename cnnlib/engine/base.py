"""What every engine can do: train one network by one stage at one batch size."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Generic, Self

from cnnlib.device import Device, Limits
from cnnlib.engine.learning_rate import constant
from cnnlib.engine.profile import KernelTime
from cnnlib.engine.shuffle import Shuffle
from cnnlib.engine.stage import Bytes, Op, Options, Order, Setup, Stage, chosen_for, name_of, plan
from cnnlib.engine.step_plan import StepPlan
from cnnlib.errors import Unsupported
from cnnlib.layers import Array


class Engine(ABC, Generic[Op]):
    """Trains `setup.network` by `stage`: mini-batches of `setup.batch_size`, plain SGD.

    The first images of `order` make the first batch, and so on; what is left over is dropped. The
    gradient is that of the mean loss over the batch. After `load`, `train` is all that is timed.
    """

    options_class: ClassVar[type[Options]] = Options
    """What the options of this engine's stages are an instance of."""
    event_seconds: float = math.nan
    """The last `train` by the device's own events; nan where there are none.

    They may be read only when this is asked for.
    """
    _steps: int = 0
    step_losses: Array | None = None
    """Mean loss of each step of the last `train`, (steps,); None unless the stage is one that does
    not repeat.
    """

    def __init__(self, stage: Stage[Op], setup: Setup, device: Device | None = None) -> None:
        self.stage = stage
        self.setup = setup
        self.network = setup.network
        self.plan = plan(stage, setup.network)
        self.operators: Sequence[object] = [p.operator for p in self.plan]
        """What serves the parts of the plan; an engine that makes objects of them keeps these."""

    @classmethod
    def operators_on(
        cls, stage: Stage[Op], setup: Setup, limits: Limits | None
    ) -> Sequence[object]:
        """The operators that an engine made of these arguments would have, or their classes.

        Nothing is compiled and no memory is taken, so that a user can ask before a sweep. Raises
        Unsupported where the engine would: a stage never hands a network to another one.
        """
        return [chosen_for(p) for p in plan(stage, setup.network)]

    @classmethod
    def source_on(cls, stage: Stage[Op], setup: Setup, limits: Limits) -> str:
        """The CUDA source that an engine made of these arguments would compile.

        No engine is made and nothing is compiled. Raises Unsupported where operators_on does, and
        for a stage that generates none.
        """
        raise Unsupported(f"stage '{stage.name}' has no generated source")

    @classmethod
    def plans_on(cls, stage: Stage[Op], setup: Setup, limits: Limits) -> Sequence[StepPlan]:
        """The ways in which an engine of these arguments could train a step, the preferred first.

        Those that decline the network are among them. There are none where operators_on says
        everything.
        """
        return ()

    @classmethod
    def record_on(cls, stage: Stage[Op], setup: Setup, limits: Limits | None) -> Stage:
        """The record by which such an engine trains: the stage, or that of one of its plans.

        Raises Unsupported where no plan takes the network.
        """
        return stage

    @property
    def served(self) -> list[str]:
        """`layers: operator` for every operator that this engine trains with."""
        return [f"{p.name}: {name_of(o)}" for p, o in zip(self.plan, self.operators, strict=True)]

    @property
    def choices(self) -> Mapping[str, object]:
        """What this engine has decided for itself, for provenance: values that JSON can hold."""
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
        """`train` on all whole batches of an epoch; the engine decides where its order is drawn."""
        size = self.setup.batch_size
        return self.train(shuffle.indices()[: len(shuffle) // size * size], rates)

    def rates_of(self, steps: int, rates: Array | None) -> Array:
        """`rates`, or those of a constant schedule: (steps,)."""
        return constant(self.setup.learning_rate, steps) if rates is None else rates

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
        """Copy of the momentum's flat vector (zeros at the start); with the parameters, the number
        of steps and the position in the order it is the whole state of a training.
        """

    @velocity.setter
    @abstractmethod
    def velocity(self, vector: Array) -> None: ...

    @property
    def steps(self) -> int:
        """Steps done since the initial weights, by which dropout's masks are drawn.

        `gradient` and `backward` use the masks of the step that comes next. `train` counts on.
        """
        return self._steps

    @steps.setter
    def steps(self, count: int) -> None:
        self._steps = count

    def profile(self) -> list[KernelTime]:
        """The kernels of one training step, or the operators where a CPU has no kernels.

        Needs `load`. Parameters, velocity and steps are the same afterwards.
        """
        return []

    def close(self) -> None:
        """Give back what the engine holds on its device."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
