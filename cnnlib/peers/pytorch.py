"""PyTorch as an engine: eager, with the step in a CUDA graph, or compiled.

PyTorch is imported by what needs it, when it needs it: it may not be installed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Device, Limits
from cnnlib.engine import (
    Bytes,
    Engine,
    Options,
    Order,
    Planned,
    Setup,
    Stage,
    options_of,
    plan,
)
from cnnlib.errors import DoesNotFit, Unsupported
from cnnlib.layers import Activation, Array, Conv, Dense, Dropout, Layer, Subsample
from cnnlib.layers.activation import TANH_RATE, TANH_SCALE
from cnnlib.levels import for_maps
from cnnlib.peers.masks import random_words
from cnnlib.system.machine import usable_cores
from cnnlib.system.turns import alone, is_untimed

if TYPE_CHECKING:
    from torch import Tensor
    from torch import device as TorchDevice
    from torch.cuda import CUDAGraph, Event

WARM_STEPS = 3
"""Steps before one is captured in a graph: libraries choose their algorithms in the first ones."""


@dataclass(frozen=True)
class TorchOptions(Options):
    """How PyTorch runs a step, beyond a call for every operation."""

    graph: Literal["never", "on a GPU", "always"] = "never"
    """Whether the step is captured in a CUDA graph; `always` makes a GPU a condition."""
    compile: bool = False
    """Whether torch.compile compiles the loss and its derivative."""


TRIED_STEPS = 20
"""Steps that are timed to find the faster way of choosing algorithms."""


class TorchOperator(Protocol):
    """Computes a layer's target of source (N, C, H, W) or (N, U) and its parameters in order."""

    def __call__(
        self, torch: ModuleType, planned: Planned, source: Tensor, parameters: Sequence[Tensor], /
    ) -> Tensor: ...


def conv(
    torch: ModuleType, planned: Planned, source: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """Convolution by conv2d."""
    weight, bias = parameters
    layer = planned.layer(Conv)
    return torch.nn.functional.conv2d(source, weight, bias, layer.stride, layer.padding)


def activation(
    torch: ModuleType, planned: Planned, source: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """The activation function of the same name: torch.relu, torch.nn.functional.leaky_relu, ..."""
    name = planned.layer(Activation).function
    if name == "scaled_tanh":
        return TANH_SCALE * torch.tanh(TANH_RATE * source)
    function = getattr(torch, name, None) or getattr(torch.nn.functional, name, None)
    if function is None:
        raise Unsupported(f"PyTorch has no activation function {name}")
    return function(source)


def subsample(
    torch: ModuleType, planned: Planned, source: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """Subsampling by max_pool2d or avg_pool2d."""
    layer, functional = planned.layer(Subsample), torch.nn.functional
    pool = functional.max_pool2d if layer.method == "max" else functional.avg_pool2d
    return pool(source, layer.size, layer.strides, layer.padding)


def dense(
    torch: ModuleType, planned: Planned, source: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """A fully connected layer by linear."""
    weight, bias = parameters
    return torch.nn.functional.linear(source.flatten(1), weight, bias)


def dropout(
    torch: ModuleType, planned: Planned, source: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """A product with the mask, in training; elsewhere the source itself."""
    return torch.mul(source, parameters[0]) if parameters else source


def counts(torch: ModuleType, planned: Planned, images: int, where: TorchDevice) -> list[Tensor]:
    """The first two words of each counter: (1, blocks) and (images, 1), int64.

    They are made once. Within a compiled function PyTorch takes such numbers for indices of 32
    bits, in which products with them do not fit.
    """
    blocks = ceil_div(math.prod(planned.source_shape), 4)
    return [
        torch.arange(blocks, device=where)[None, :],
        torch.arange(images, device=where)[:, None],
    ]


def mask(
    torch: ModuleType, planned: Planned, words: Sequence[Tensor], step: Tensor, seed: int
) -> Tensor:
    """The mask of dropout, (images, *shape), for the first images of a batch; step () int64."""
    layer, shape = planned.layer(Dropout), planned.source_shape
    size = math.prod(shape)
    word = 2**32 - 1

    def multiply(number: int, words: Tensor) -> tuple[Tensor, Tensor]:
        # The product of two words wraps around in int64, which leaves all of its bits.
        product = words * number
        return (product >> 32) & word, product & word

    layer_word = torch.full_like(step, planned.start)
    counter = torch.broadcast_tensors(*words, step & word, layer_word)
    drawn = torch.stack(random_words(multiply, torch.bitwise_xor, counter, seed), dim=-1)
    kept = drawn.reshape(len(words[1]), -1)[:, :size] >= layer.threshold
    return (kept * layer.scale).to(torch.float32).reshape(-1, *shape)


def function_of(planned: Planned[TorchOperator]) -> str:
    """The name of the function of PyTorch that the layer's operator calls."""
    layer = planned.layers[0]
    if isinstance(layer, Activation):
        return "tanh" if layer.function == "scaled_tanh" else layer.function
    if isinstance(layer, Dropout):
        return "mul"
    if isinstance(layer, Subsample):
        return "max_pool2d" if layer.method == "max" else "avg_pool2d"
    return "conv2d" if isinstance(layer, Conv) else "linear"


OPERATORS: dict[tuple[type[Layer], ...], TorchOperator] = {
    (Conv,): conv,
    (Activation,): activation,
    (Subsample,): subsample,
    (Dense,): dense,
    (Dropout,): dropout,
}


def usable(stage: Stage[TorchOperator], setup: Setup) -> ModuleType:
    """The module torch; Unsupported where it is not installed or lacks what the stage needs."""
    try:
        import torch
    except ImportError:
        raise Unsupported(
            f"stage '{stage.name}' needs PyTorch, which is not installed (pip install torch)"
        ) from None
    on_gpu = setup.device_kind == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise Unsupported(f"stage '{stage.name}': this PyTorch cannot use the GPU")
    if not on_gpu and options_of(stage, TorchOptions).graph == "always":
        raise Unsupported(f"stage '{stage.name}' needs a GPU: CUDA graphs are launches of one")
    if not on_gpu and stage.rounding:
        raise Unsupported(f"stage '{stage.name}' needs a GPU: TF32 is of its tensor cores")
    module: ModuleType = torch
    return module


class TorchEngine(Engine[TorchOperator]):
    """Plain SGD by torch.optim on tensors that hold the network's parameters."""

    options_class = TorchOptions

    def __init__(
        self, stage: Stage[TorchOperator], setup: Setup, device: Device | None = None
    ) -> None:
        super().__init__(stage, setup, device)
        self.operators = self.operators_on(stage, setup, device)
        self.torch = torch = usable(stage, setup)
        on_gpu = setup.device_kind == "cuda"
        self.where = torch.device("cuda" if on_gpu else "cpu")
        # A number is faster than a tensor; tensors are there before a graph is captured.
        self._mean, self._deviation = (
            torch.as_tensor(for_maps(level, np.float32), device=self.where)
            if isinstance(level, tuple)
            else level
            for level in (setup.mean, setup.deviation)
        )
        options = options_of(stage, TorchOptions)
        self.graphed = options.graph != "never" and on_gpu
        self.compiled = options.compile
        torch.set_num_threads(usable_cores())
        torch.backends.cuda.matmul.allow_tf32 = bool(stage.rounding)
        torch.backends.cudnn.allow_tf32 = bool(stage.rounding)
        self._tensors = [
            torch.zeros(p.shape, device=self.where, requires_grad=True)
            for p in self.network.parameters
        ]
        # A graph counts its steps by itself, so that each of them draws masks of its own.
        self._number = torch.zeros((), dtype=torch.int64, device=self.where)
        self._counts = {
            p.start: counts(torch, p, setup.batch_size, self.where)
            for p in self.plan
            if isinstance(p.layers[0], Dropout)
        }
        self._mask_of = self._compiled_masks() if self.network.drops_out else mask
        momentum = setup.momentum
        # A rate that changes must be a tensor, or a graph keeps the first; `fused` accepts one.
        self._changing = setup.warmup is not None
        rate: float | Tensor = setup.learning_rate
        if self._changing:
            rate = self._rate = torch.full((), setup.learning_rate, device=self.where)
        self._optimizer = torch.optim.SGD(
            self._tensors,
            lr=rate,
            momentum=momentum,
            weight_decay=setup.weight_decay,
            foreach=not self._changing,
            fused=self._changing,
        )
        if momentum:
            for tensor in self._tensors:
                self._optimizer.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)
        self._loss: Callable[[Tensor, Tensor, Tensor], Tensor] = self._loss_of
        if self.compiled:
            self._loss = torch.compile(self._loss_of, fullgraph=True, dynamic=False)
        self._graph: CUDAGraph | None = None
        self._choices: dict[str, object] = {}
        self._events: list[Event] = []

    # The network

    @classmethod
    def operators_on(
        cls, stage: Stage[TorchOperator], setup: Setup, limits: Limits | None
    ) -> list[str]:
        usable(stage, setup)
        return [function_of(planned) for planned in plan(stage, setup.network)]

    def _compiled_masks(self) -> Callable[..., Tensor]:
        """`mask` in one kernel, where PyTorch can compile: its hundred calls would take longer than
        a library's own dropout.
        """
        if self.compiled:
            return mask  # it becomes a part of the whole
        compiled: Callable[..., Tensor] = self.torch.compile(mask, dynamic=False)
        try:
            for planned in self.plan:
                if words := self._counts.get(planned.start):
                    compiled(self.torch, planned, words, self._number, self.setup.seed)
        except Exception:  # no compiler, or one that fails: the calls are right, too
            return mask
        return compiled

    def _logits_of(self, images: Tensor, step: Tensor | None = None) -> Tensor:
        """(n, classes); `step` is the number of the step that trains on them, if one does."""
        values = (images.to(self.torch.float32) - self._mean) / self._deviation
        views: list[list[Tensor]] = [[] for _ in self.network.layers]
        for p, tensor in zip(self.network.parameters, self._tensors, strict=True):
            views[p.layer].append(tensor)
        for planned in self.plan:
            given = views[planned.start]
            if step is not None and isinstance(planned.layers[0], Dropout):
                count, seed = len(values), self.setup.seed
                blocks, places = self._counts[planned.start]
                words = blocks, places[:count]
                given = [self._mask_of(self.torch, planned, words, step, seed)]
            values = planned.operator(self.torch, planned, values, given)
        return values.flatten(1)

    def _loss_of(self, images: Tensor, labels: Tensor, step: Tensor) -> Tensor:
        functional, logits = self.torch.nn.functional, self._logits_of(images, step)
        if self.setup.loss == "cross_entropy":
            return functional.cross_entropy(logits, labels)
        wanted = functional.one_hot(labels, self.network.classes)
        return functional.mse_loss(logits, wanted.to(logits.dtype))

    @contextlib.contextmanager
    def _memory(self) -> Iterator[None]:
        try:
            yield
        except self.torch.cuda.OutOfMemoryError as error:
            raise DoesNotFit(str(error).partition("\n")[0]) from None

    # Training

    def load(self, images: Bytes, labels: Bytes) -> None:
        torch, count = self.torch, len(labels)
        state = self.parameters, self.velocity, self.steps
        with self._memory():
            self._images = torch.from_numpy(np.ascontiguousarray(images)).to(self.where)
            self._labels = torch.from_numpy(labels.astype(np.int64)).to(self.where)
            self._order = torch.zeros(count, dtype=torch.int64, device=self.where)
            # A step's loss goes to the place of its first image in the order.
            self._losses = torch.zeros(count, device=self.where)
            self._first = torch.zeros((), dtype=torch.int64, device=self.where)
            self._rates = torch.full((count,), self.setup.learning_rate, device=self.where)
            self._batch = torch.arange(self.setup.batch_size, device=self.where)
            if self._on_gpu and not is_untimed():
                self._choose_algorithms()
            else:
                self._prepare()
        self.parameters, self.velocity, self.steps = state  # warming up has changed them

    @property
    def choices(self) -> Mapping[str, object]:
        return {
            "cuda_graph": self._graph is not None,
            "compiled": self._loss != self._loss_of,
            **self._choices,
        }

    def _prepare(self) -> None:
        if self.graphed:
            self._capture()
        elif self.compiled:
            self._losses[0] = self._train_on(self._order[: self.setup.batch_size])

    def _choose_algorithms(self) -> None:
        """Let cuDNN guess algorithms of convolutions, or try them all, whichever trains faster."""
        cudnn = self.torch.backends.cudnn
        seconds = {}
        cudnn.benchmark = False
        self._prepare()  # compiling takes long, and times no algorithms of cuDNN
        with alone():
            seconds[False] = min(self._tried() for _ in range(3))
            cudnn.benchmark = True
            self._prepare()
            seconds[True] = min(self._tried() for _ in range(3))
        cudnn.benchmark = seconds[True] < seconds[False]
        if not cudnn.benchmark:
            self._prepare()
        self._choices = {
            "cudnn_benchmark": cudnn.benchmark,
            "seconds_without_and_with_it": list(seconds.values()),
        }

    def _tried(self) -> float:
        """Seconds that TRIED_STEPS steps take, or all there are."""
        batch = self.setup.batch_size
        steps = min(TRIED_STEPS, len(self._order) // batch)
        began = time.perf_counter()
        self.train(np.arange(steps * batch))
        return time.perf_counter() - began

    def _train_on(self, chosen: Tensor) -> Tensor:
        """Take one step on the images with these indices; returns its loss, on the device."""
        loss = self._loss(self._images[chosen], self._labels[chosen], self._number)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._number += 1
        return loss.detach()

    def _train_next(self) -> None:
        """Take one step on the batch at self._first and advance that, as a graph can repeat."""
        if self._changing:
            # plain indexing would copy the number to the host, which a graph cannot do
            self._rate.copy_(self._rates.index_select(0, self._first.view(1)).view(()))
        loss = self._train_on(self._order[self._first + self._batch])
        self._losses.index_copy_(0, self._first.view(1), loss.view(1))
        self._first += self.setup.batch_size

    def _capture(self) -> None:
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_STEPS):
                self._first.zero_()
                self._train_next()
        torch.cuda.current_stream().wait_stream(stream)
        self._first.zero_()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._train_next()

    def train(self, order: Order, rates: Array | None = None) -> float:
        torch, batch = self.torch, self.setup.batch_size
        steps = len(order) // batch
        due = self.rates_of(steps, rates)
        if not self._changing and (due != self.setup.learning_rate).any():
            raise ValueError("learning rates that change need a setup with a warmup")
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._on_gpu else []
        if events:
            events[0].record()
        wanted = torch.from_numpy(np.ascontiguousarray(order[: steps * batch], dtype=np.int64))
        self._order[: steps * batch].copy_(wanted, non_blocking=True)
        if self._changing:
            spread = np.repeat(due, batch).astype(np.float32)
            self._rates[: steps * batch].copy_(torch.from_numpy(spread), non_blocking=True)
        self._first.zero_()
        with self._memory():
            for step in range(steps):
                if self._graph is not None:
                    self._graph.replay()
                else:
                    if self._changing:
                        self._rate.copy_(self._rates[step * batch])
                    first = step * batch
                    self._losses[first] = self._train_on(self._order[first : first + batch])
        if events:
            events[1].record()
        self.step_losses = self._losses[: steps * batch : batch].cpu().numpy()
        self._events = events
        loss = float(self.step_losses.mean(dtype=np.float64))
        self._steps += steps
        return loss

    @property
    def event_seconds(self) -> float:  # type: ignore[override]
        """As in an engine of ours, read only when it is asked for."""
        if not self._events:
            return math.nan
        began, ended = self._events
        return float(began.elapsed_time(ended)) / 1e3

    @property
    def _on_gpu(self) -> bool:
        return bool(self.where.type == "cuda")

    # What is compared

    def _put(self, images: Bytes) -> Tensor:
        return self.torch.from_numpy(np.ascontiguousarray(images)).to(self.where)

    def gradient(self, images: Bytes, labels: Bytes) -> tuple[float, Array]:
        wanted = self.torch.from_numpy(labels.astype(np.int64)).to(self.where)
        loss = self._loss_of(self._put(images), wanted, self._number)
        return float(loss.detach()), self._flat(self.torch.autograd.grad(loss, self._tensors))

    def backward(self, images: Bytes, output_error: Array) -> Array:
        errors = self.torch.from_numpy(np.ascontiguousarray(output_error, dtype=np.float32))
        logits = self._logits_of(self._put(images), self._number)
        return self._flat(
            self.torch.autograd.grad(logits, self._tensors, grad_outputs=errors.to(self.where))
        )

    def logits(self, images: Bytes) -> Array:
        batch = self.setup.batch_size
        found = np.empty((len(images), self.network.classes), np.float32)
        with self.torch.no_grad(), self._memory():
            for start in range(0, len(images), batch):
                part = self._logits_of(self._put(images[start : start + batch]))
                found[start : start + batch] = part.cpu().numpy()
        return found

    def _flat(self, tensors: Iterable[Tensor]) -> Array:
        parts = [tensor.detach().reshape(-1).cpu().numpy() for tensor in tensors]
        return np.concatenate(parts).astype(np.float32)

    def _fill(self, tensors: Iterable[Tensor], vector: Array) -> None:
        given = np.ascontiguousarray(vector, dtype=np.float32)
        with self.torch.no_grad():
            for p, tensor in zip(self.network.parameters, tensors, strict=True):
                part = given[p.offset : p.offset + p.size].reshape(p.shape)
                tensor.copy_(self.torch.from_numpy(part))

    def _buffers(self) -> list[Tensor]:
        state = self._optimizer.state
        return [state[tensor]["momentum_buffer"] for tensor in self._tensors]

    @property
    def parameters(self) -> Array:
        return self._flat(self._tensors)

    @parameters.setter
    def parameters(self, vector: Array) -> None:
        self._fill(self._tensors, vector)

    @property
    def velocity(self) -> Array:
        """Zeros where there is no momentum, because the optimiser then keeps no velocity."""
        if not self.setup.momentum:
            return np.zeros(self.network.parameter_count, np.float32)
        return self._flat(self._buffers())

    @velocity.setter
    def velocity(self, vector: Array) -> None:
        if self.setup.momentum:
            self._fill(self._buffers(), vector)

    @property
    def steps(self) -> int:
        return self._steps

    @steps.setter
    def steps(self, count: int) -> None:
        self._steps = count
        self._number.fill_(count)

    def close(self) -> None:
        self._graph = None
        if self._on_gpu:
            self.torch.cuda.empty_cache()
