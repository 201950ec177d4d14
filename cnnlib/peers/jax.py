"""JAX as an engine: a whole epoch in one jitted scan, in the better of two layouts of the maps.

JAX is imported by what needs it, when it needs it: it may not be installed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Device, Limits
from cnnlib.engine import Bytes, Engine, Order, Planned, Setup, Stage, plan
from cnnlib.errors import DoesNotFit, Unsupported
from cnnlib.layers import Activation, Array, Conv, Dense, Dropout, Layer, Subsample
from cnnlib.layers.activation import TANH_RATE, TANH_SCALE
from cnnlib.levels import for_maps
from cnnlib.peers.masks import random_words
from cnnlib.system.turns import alone, is_untimed

if TYPE_CHECKING:
    from jax import Array as Tensor
    from jax import Device as JaxDevice

    State = tuple[Sequence[Tensor], Sequence[Tensor], Tensor]
    """Weights, velocities and the losses of steps."""

LAYOUTS = ("NCHW", "NHWC")
TRIED_STEPS = 20
"""Steps that are timed to find the better layout."""
UNTIMED = {"xla_gpu_autotune_level": 0}
"""Options for programs that are never timed: XLA takes an algorithm without trying any.

Of LeNet-5's gradient at batch 64, which only checks need, 8 s of compiling on an H100 were trials.
"""
EVALUATED = 256
"""Images, at least, that an evaluation computes by one call: it is never timed."""


class JaxOperator(Protocol):
    """Computes a layer's target of `source`, whose maps lie as `layout` says, or (N, U)."""

    def __call__(
        self,
        jax: ModuleType,
        layout: str,
        planned: Planned,
        source: Tensor,
        parameters: Sequence[Tensor],
        /,
    ) -> Tensor: ...


def conv(
    jax: ModuleType, layout: str, planned: Planned, source: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """Convolution by lax.conv_general_dilated."""
    weight, bias = parameters
    layer = planned.layer(Conv)
    padding = [(p, p) for p in layer.padding]
    sums = jax.lax.conv_general_dilated(
        source, weight, layer.stride, padding, dimension_numbers=(layout, "OIHW", layout)
    )
    return sums + (bias[:, None, None] if layout == "NCHW" else bias)


def activation(
    jax: ModuleType, layout: str, planned: Planned, source: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """The activation function of the same name in jax.nn."""
    name = planned.layer(Activation).function
    if name == "scaled_tanh":
        return TANH_SCALE * jax.nn.tanh(TANH_RATE * source)
    if name == "gelu":
        return jax.nn.gelu(source, approximate=False)
    if not hasattr(jax.nn, name):
        raise Unsupported(f"JAX has no activation function {name}")
    return getattr(jax.nn, name)(source)


def subsample(
    jax: ModuleType, layout: str, planned: Planned, source: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """Subsampling by lax.reduce_window."""
    layer = planned.layer(Subsample)
    rows, columns = layout.index("H"), layout.index("W")
    sizes, strides, padding = [1] * 4, [1] * 4, [(0, 0)] * 4
    sizes[rows], sizes[columns] = layer.size
    strides[rows], strides[columns] = layer.strides
    padding[rows], padding[columns] = ((p, p) for p in layer.padding)
    if layer.method == "max":
        return jax.lax.reduce_window(source, -np.inf, jax.lax.max, sizes, strides, padding)
    sums = jax.lax.reduce_window(source, 0.0, jax.lax.add, sizes, strides, padding)
    return sums / math.prod(layer.size)


def dense(
    jax: ModuleType, layout: str, planned: Planned, source: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """A fully connected layer as a product of matrices."""
    weight, bias = parameters
    if source.ndim == 4 and layout == "NHWC":
        source = source.transpose(0, 3, 1, 2)  # the order in which the weights expect the maps
    return source.reshape(len(source), -1) @ weight.T + bias


def dropout(
    jax: ModuleType, layout: str, planned: Planned, source: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """A product with the mask, in training; elsewhere the source itself."""
    if not parameters:
        return source
    (kept,) = parameters
    if source.ndim == 4 and layout == "NHWC":
        kept = kept.transpose(0, 2, 3, 1)
    return jax.numpy.multiply(source, kept)


def mask(jax: ModuleType, planned: Planned, images: int, step: Tensor, seed: int) -> Tensor:
    """The mask of dropout, (images, *shape), for the first images of a batch; step () uint32."""
    layer, shape, word = planned.layer(Dropout), planned.source_shape, jax.numpy.uint32
    size = math.prod(shape)

    def multiply(number: int, words: Tensor) -> tuple[Tensor, Tensor]:
        # JAX has no 64-bit integers unless all of its numbers may be 64 bits: halves of 16 bits.
        top, bottom = word(number >> 16), word(number & 0xFFFF)
        high, low = words >> 16, words & word(0xFFFF)
        middle = bottom * high + ((bottom * low) >> 16)
        carried = top * low + (middle & word(0xFFFF))
        return top * high + (middle >> 16) + (carried >> 16), words * word(number)

    blocks = jax.numpy.arange(ceil_div(size, 4), dtype=word)[None, :]
    places = jax.numpy.arange(images, dtype=word)[:, None]
    counter = jax.numpy.broadcast_arrays(blocks, places, step, word(planned.start))
    words = random_words(
        multiply, lambda a, b: a ^ (word(b) if isinstance(b, int) else b), counter, seed
    )
    drawn = jax.numpy.stack(words, axis=-1).reshape(images, -1)[:, :size]
    kept = (drawn >= word(layer.threshold)).astype(np.float32) * np.float32(layer.scale)
    return kept.reshape(images, *shape)


def function_of(planned: Planned[JaxOperator]) -> str:
    """The name of the function of JAX that the layer's operator calls; matmul is written @."""
    layer = planned.layers[0]
    if isinstance(layer, Activation):
        return "tanh" if layer.function == "scaled_tanh" else layer.function
    if isinstance(layer, Dropout):
        return "multiply"
    if isinstance(layer, Subsample):
        return "reduce_window"
    return "conv_general_dilated" if isinstance(layer, Conv) else "matmul"


OPERATORS: dict[tuple[type[Layer], ...], JaxOperator] = {
    (Conv,): conv,
    (Activation,): activation,
    (Subsample,): subsample,
    (Dense,): dense,
    (Dropout,): dropout,
}


def usable(stage: Stage[JaxOperator], setup: Setup) -> tuple[ModuleType, JaxDevice]:
    """The module jax and the device to use; Unsupported where either is missing."""
    # By default JAX reserves three quarters of the GPU's memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax
    except ImportError:
        raise Unsupported(
            f"stage '{stage.name}' needs JAX, which is not installed (pip install jax)"
        ) from None
    if setup.device_kind != "cuda" and stage.rounding:
        raise Unsupported(f"stage '{stage.name}' needs a GPU: TF32 is of its tensor cores")
    kind = "gpu" if setup.device_kind == "cuda" else "cpu"
    try:
        return jax, jax.devices(kind)[0]
    except RuntimeError:
        raise Unsupported(f"stage '{stage.name}': this JAX cannot use the {kind}") from None


class JaxEngine(Engine[JaxOperator]):
    """Plain SGD; the state is a tuple of parameters and one of velocities."""

    def __init__(
        self, stage: Stage[JaxOperator], setup: Setup, device: Device | None = None
    ) -> None:
        super().__init__(stage, setup, device)
        self.operators = self.operators_on(stage, setup, device)
        jax, self.where = usable(stage, setup)
        self.jax = jax
        jax.config.update(
            "jax_default_matmul_precision", "tensorfloat32" if stage.rounding else "highest"
        )
        self.layout = LAYOUTS[0]
        # only these two may be timed
        options = UNTIMED if is_untimed() else None
        timed = {"static_argnums": 0, "donate_argnums": (1, 2), "compiler_options": options}
        self._epoch = jax.jit(self._scan, **timed)
        self._some = jax.jit(self._loop, **timed)
        untimed = {"static_argnums": 0, "compiler_options": UNTIMED}
        self._outputs = jax.jit(self._logits_of, **untimed)
        self._gradient = jax.jit(jax.value_and_grad(self._loss_of, argnums=1), **untimed)
        self._pulled = jax.jit(self._backward_of, **untimed)
        self._weights = self._tensors(np.zeros(self.network.parameter_count))
        self._speeds = self._tensors(np.zeros(self.network.parameter_count))

    # The network

    @classmethod
    def operators_on(
        cls, stage: Stage[JaxOperator], setup: Setup, limits: Limits | None
    ) -> list[str]:
        usable(stage, setup)
        return [function_of(planned) for planned in plan(stage, setup.network)]

    def _logits_of(
        self, layout: str, weights: Sequence[Tensor], images: Tensor, step: Tensor | None = None
    ) -> Tensor:
        """(n, classes); `step` is the number of the step that trains on them, if one does."""
        levels = self.setup.mean, self.setup.deviation
        mean, deviation = (for_maps(level, np.float32) for level in levels)
        values = (images.astype(np.float32) - mean) / deviation
        if layout == "NHWC":
            values = values.transpose(0, 2, 3, 1)
        views: list[list[Tensor]] = [[] for _ in self.network.layers]
        for p, tensor in zip(self.network.parameters, weights, strict=True):
            views[p.layer].append(tensor)
        for planned in self.plan:
            given = views[planned.start]
            if step is not None and isinstance(planned.layers[0], Dropout):
                given = [mask(self.jax, planned, len(values), step, self.setup.seed)]
            values = planned.operator(self.jax, layout, planned, values, given)
        if values.ndim == 4 and layout == "NHWC":
            values = values.transpose(0, 3, 1, 2)
        return values.reshape(len(values), -1)

    def _loss_of(
        self,
        layout: str,
        weights: Sequence[Tensor],
        images: Tensor,
        labels: Tensor,
        step: Tensor,
    ) -> Tensor:
        logits = self._logits_of(layout, weights, images, step)
        if self.setup.loss == "mean_squared_error":
            wanted = self.jax.nn.one_hot(labels, self.network.classes)
            return self.jax.numpy.mean((logits - wanted) ** 2)
        shares = self.jax.nn.log_softmax(logits)
        chosen = self.jax.numpy.take_along_axis(shares, labels[:, None].astype(np.int32), axis=1)
        return -chosen.mean()

    def _backward_of(
        self,
        layout: str,
        weights: Sequence[Tensor],
        images: Tensor,
        step: Tensor,
        output_error: Tensor,
    ) -> Sequence[Tensor]:
        """The gradient for given errors of the logits, (n, classes)."""
        _, pull = self.jax.vjp(lambda w: self._logits_of(layout, w, images, step), weights)
        gradient: Sequence[Tensor] = pull(output_error)[0]
        return gradient

    def _step(
        self,
        layout: str,
        weights: Sequence[Tensor],
        speeds: Sequence[Tensor],
        images: Tensor,
        labels: Tensor,
        rate: Tensor,
        number: Tensor,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(weights, velocities, loss) after one step on these images."""
        loss, gradient = self.jax.value_and_grad(self._loss_of, argnums=1)(
            layout, weights, images, labels, number
        )
        momentum, decay = self.setup.momentum, self.setup.weight_decay
        if decay:
            gradient = [g + decay * w for g, w in zip(gradient, weights, strict=True)]
        after = [momentum * v + g for v, g in zip(speeds, gradient, strict=True)]
        return [w - rate * v for w, v in zip(weights, after, strict=True)], after, loss

    def _scan(
        self,
        layout: str,
        weights: Sequence[Tensor],
        speeds: Sequence[Tensor],
        images: Tensor,
        labels: Tensor,
        order: Tensor,
        rates: Tensor,
        numbers: Tensor,
    ) -> State:
        """Train on a whole epoch: order (steps, batch), rates and numbers of the steps (steps,)."""

        def body(
            state: tuple[Sequence[Tensor], Sequence[Tensor]], step: tuple[Tensor, Tensor, Tensor]
        ) -> tuple[tuple[list[Tensor], list[Tensor]], Tensor]:
            weights, speeds = state
            chosen, rate, number = step
            new_weights, new_speeds, loss = self._step(
                layout, weights, speeds, images[chosen], labels[chosen], rate, number
            )
            return (new_weights, new_speeds), loss

        (weights, speeds), losses = self.jax.lax.scan(
            body, (weights, speeds), (order, rates, numbers)
        )
        return weights, speeds, losses

    def _loop(
        self,
        layout: str,
        weights: Sequence[Tensor],
        speeds: Sequence[Tensor],
        images: Tensor,
        labels: Tensor,
        order: Tensor,
        rates: Tensor,
        numbers: Tensor,
        steps: int,
    ) -> State:
        """Train on the first `steps` steps of `order`; compiled once for any number of them."""

        def body(step: Tensor, state: State) -> State:
            weights, speeds, losses = state
            chosen = order[step]
            weights, speeds, loss = self._step(
                layout, weights, speeds, images[chosen], labels[chosen], rates[step], numbers[step]
            )
            return weights, speeds, losses.at[step].set(loss)

        start = weights, speeds, self.jax.numpy.zeros(len(rates), np.float32)
        state: State = self.jax.lax.fori_loop(0, steps, body, start)
        return state

    # Training

    def load(self, images: Bytes, labels: Bytes) -> None:
        jax, batch = self.jax, self.setup.batch_size
        self._epoch_steps = len(labels) // batch
        state = self.parameters, self.velocity, self.steps
        try:
            self._images = jax.device_put(np.ascontiguousarray(images), self.where)
            self._labels = jax.device_put(labels, self.where)
            with alone():  # compiling, XLA times the algorithms of convolutions
                if not is_untimed():
                    self.layout = min(LAYOUTS, key=self._tried)
                order = np.arange(self._epoch_steps * batch) % len(labels)
                self.train(order)  # compiles the program of an epoch
                self.train(order[:batch])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFit(str(error).partition("\n")[0]) from None
        self.parameters, self.velocity, self.steps = state  # the trials have changed them

    @property
    def choices(self) -> Mapping[str, object]:
        return {"layout": self.layout}

    def _tried(self, layout: str) -> float:
        """Seconds that TRIED_STEPS steps take in this layout, once they are compiled."""
        self.layout = layout
        steps = min(TRIED_STEPS, self._epoch_steps)
        order = np.arange(steps * self.setup.batch_size)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            self._run(order, self.rates_of(steps, None))
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:])

    def train(self, order: Order, rates: Array | None = None) -> float:
        """Longer orders than an epoch are trained in parts of an epoch."""
        batch = self.setup.batch_size
        steps = len(order) // batch
        due = self.rates_of(steps, rates)
        losses = []
        for first in range(0, steps, self._epoch_steps):
            part = min(self._epoch_steps, steps - first)
            chosen = order[first * batch : (first + part) * batch]
            losses.append(self._run(chosen, due[first : first + part]))
            self.steps += part
        self.step_losses = np.concatenate(losses)
        return float(self.step_losses.mean(dtype=np.float64))

    def _run(self, order: Order, rates: Array) -> Array:
        """Train on len(rates) steps of `order`, an epoch at most; the steps' losses (steps,)."""
        batch, steps = self.setup.batch_size, len(rates)
        whole = steps == self._epoch_steps
        chosen = np.zeros((self._epoch_steps, batch), np.int32)
        chosen[:steps] = order[: steps * batch].reshape(steps, batch)
        due = np.zeros(self._epoch_steps, np.float32)
        due[:steps] = rates
        args = self.layout, self._weights, self._speeds, self._images, self._labels
        numbers = ((self.steps + np.arange(self._epoch_steps)) % 2**32).astype(np.uint32)
        there = self.jax.device_put((chosen, due, numbers), self.where)
        state = self._epoch(*args, *there) if whole else self._some(*args, *there, steps)
        self._weights, self._speeds, losses = state
        return np.asarray(losses)[:steps]

    # What is compared

    def gradient(self, images: Bytes, labels: Bytes) -> tuple[float, Array]:
        loss, gradient = self._gradient(
            self.layout, self._weights, self._put(images), self._put(labels), self._step_number
        )
        return float(loss), self._flat(gradient)

    def backward(self, images: Bytes, output_error: Array) -> Array:
        errors = self._put(np.asarray(output_error, np.float32))
        given = self.layout, self._weights, self._put(images), self._step_number, errors
        return self._flat(self._pulled(*given))

    def logits(self, images: Bytes) -> Array:
        batch = max(self.setup.batch_size, EVALUATED)
        found = np.empty((len(images), self.network.classes), np.float32)
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            # always a whole batch, so that nothing is compiled anew for the last one
            padded = np.zeros((batch, *images.shape[1:]), images.dtype)
            padded[: len(part)] = part
            outputs = self._outputs(self.layout, self._weights, self._put(padded))
            found[start : start + batch] = np.asarray(outputs)[: len(part)]
        return found

    @property
    def _step_number(self) -> Tensor:
        return self._put(np.array(self.steps % 2**32, np.uint32))

    def _put(self, array: Array) -> Tensor:
        return self.jax.device_put(np.ascontiguousarray(array), self.where)

    def _tensors(self, vector: Array) -> list[Tensor]:
        given = np.asarray(vector, np.float32)
        return [
            self.jax.device_put(given[p.offset : p.offset + p.size].reshape(p.shape), self.where)
            for p in self.network.parameters
        ]

    def _flat(self, tensors: Iterable[Tensor]) -> Array:
        return np.concatenate([np.asarray(tensor).reshape(-1) for tensor in tensors])

    @property
    def parameters(self) -> Array:
        return self._flat(self._weights)

    @parameters.setter
    def parameters(self, vector: Array) -> None:
        self._weights = self._tensors(vector)

    @property
    def velocity(self) -> Array:
        return self._flat(self._speeds)

    @velocity.setter
    def velocity(self, vector: Array) -> None:
        self._speeds = self._tensors(vector)
