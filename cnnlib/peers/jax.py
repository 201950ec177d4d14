"""JAX as an engine: a whole epoch in one jitted scan, in the better of two layouts of the maps."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cnnlib.device import Device, Limits
from cnnlib.engine import Bytes, Engine, Order, Planned, Setup, Stage, plan
from cnnlib.errors import DoesNotFit, Unsupported
from cnnlib.layers import Activation, Array, Conv, Dense, Layer, Subsample

LAYOUTS = ("NCHW", "NHWC")
TRIED_STEPS = 20
"""Steps by which the better layout is found."""


def conv(jax: Any, layout: str, planned: Planned, source: Any, weight: Any, bias: Any) -> Any:
    """lax.conv_general_dilated"""
    stride = planned.layers[0].stride  # type: ignore[attr-defined]
    sums = jax.lax.conv_general_dilated(
        source, weight, (stride, stride), "VALID", dimension_numbers=(layout, "OIHW", layout)
    )
    return sums + (bias[:, None, None] if layout == "NCHW" else bias)


def activation(jax: Any, layout: str, planned: Planned, source: Any) -> Any:
    """relu, tanh or sigmoid"""
    return getattr(jax.nn, planned.layers[0].function)(source)  # type: ignore[attr-defined]


def subsample(jax: Any, layout: str, planned: Planned, source: Any) -> Any:
    """lax.reduce_window"""
    layer: Any = planned.layers[0]
    sizes = tuple(layer.size if axis in "HW" else 1 for axis in layout)
    if layer.method == "max":
        return jax.lax.reduce_window(source, -np.inf, jax.lax.max, sizes, sizes, "VALID")
    sums = jax.lax.reduce_window(source, 0.0, jax.lax.add, sizes, sizes, "VALID")
    return sums / layer.size**2


def dense(jax: Any, layout: str, planned: Planned, source: Any, weight: Any, bias: Any) -> Any:
    """dot"""
    if source.ndim == 4 and layout == "NHWC":
        source = source.transpose(0, 3, 1, 2)  # the order in which the weights see the maps
    return source.reshape(len(source), -1) @ weight.T + bias


def function_of(planned: Planned) -> str:
    """The name of the function of JAX that the layer's operator calls; matmul is written @."""
    layer: Any = planned.layers[0]
    if isinstance(layer, Activation):
        return str(layer.function)
    if isinstance(layer, Subsample):
        return "reduce_window"
    return "conv_general_dilated" if isinstance(layer, Conv) else "matmul"


OPERATORS: dict[tuple[type[Layer], ...], Any] = {
    (Conv,): conv,
    (Activation,): activation,
    (Subsample,): subsample,
    (Dense,): dense,
}


def usable(stage: Stage, setup: Setup) -> tuple[Any, Any]:
    """JAX and the device it is to use; Unsupported where it is not installed or lacks one."""
    # Otherwise it takes three quarters of the GPU's memory, whatever it needs.
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


class JaxEngine(Engine):
    """Plain SGD; the state is a tuple of parameters and one of velocities."""

    def __init__(self, stage: Stage, setup: Setup, device: Device | None = None) -> None:
        super().__init__(stage, setup, device)
        self.operators = self.operators_on(stage, setup, device)
        jax, self.where = usable(stage, setup)
        self.jax = jax
        jax.config.update(
            "jax_default_matmul_precision", "tensorfloat32" if stage.rounding else "highest"
        )
        self.layout = LAYOUTS[0]
        self._loss = jax.jit(self._loss_of, static_argnums=0)
        self._outputs = jax.jit(self._logits_of, static_argnums=0)
        self._epoch = jax.jit(self._scan, static_argnums=0, donate_argnums=(1, 2))
        self._some = jax.jit(self._loop, static_argnums=0, donate_argnums=(1, 2))
        self._weights = self._tensors(np.zeros(self.network.parameter_count))
        self._speeds = self._tensors(np.zeros(self.network.parameter_count))

    # The network

    @classmethod
    def operators_on(cls, stage: Stage, setup: Setup, limits: Limits | None) -> list[str]:
        usable(stage, setup)
        return [function_of(planned) for planned in plan(stage, setup.network)]

    def _logits_of(self, layout: str, weights: Any, images: Any) -> Any:
        values = (images.astype(np.float32) - self.setup.mean) / self.setup.deviation
        if layout == "NHWC":
            values = values.transpose(0, 2, 3, 1)
        views: list[list[Any]] = [[] for _ in self.network.layers]
        for p, tensor in zip(self.network.parameters, weights, strict=True):
            views[p.layer].append(tensor)
        for planned in self.plan:
            values = planned.operator(self.jax, layout, planned, values, *views[planned.start])
        if values.ndim == 4 and layout == "NHWC":
            values = values.transpose(0, 3, 1, 2)
        return values.reshape(len(values), -1)

    def _loss_of(self, layout: str, weights: Any, images: Any, labels: Any) -> Any:
        shares = self.jax.nn.log_softmax(self._logits_of(layout, weights, images))
        chosen = self.jax.numpy.take_along_axis(shares, labels[:, None].astype(np.int32), axis=1)
        return -chosen.mean()

    def _step(self, layout: str, weights: Any, speeds: Any, images: Any, labels: Any,
              rate: Any) -> Any:  # fmt: skip
        loss, gradient = self.jax.value_and_grad(self._loss_of, argnums=1)(
            layout, weights, images, labels
        )
        momentum = self.setup.momentum
        speeds = [momentum * v + g for v, g in zip(speeds, gradient, strict=True)]
        weights = [w - rate * v for w, v in zip(weights, speeds, strict=True)]
        return weights, speeds, loss

    def _scan(self, layout: str, weights: Any, speeds: Any, images: Any, labels: Any,
              order: Any, rates: Any) -> Any:  # fmt: skip
        """A whole epoch: order (steps, batch), rates (steps,)."""

        def body(state: Any, step: Any) -> Any:
            weights, speeds = state
            chosen, rate = step
            weights, speeds, loss = self._step(
                layout, weights, speeds, images[chosen], labels[chosen], rate
            )
            return (weights, speeds), loss

        (weights, speeds), losses = self.jax.lax.scan(body, (weights, speeds), (order, rates))
        return weights, speeds, losses

    def _loop(self, layout: str, weights: Any, speeds: Any, images: Any, labels: Any, order: Any,
              rates: Any, steps: Any) -> Any:  # fmt: skip
        """The first `steps` steps of order (steps, batch), compiled once for any number of them."""

        def body(step: Any, state: Any) -> Any:
            weights, speeds, losses = state
            chosen = order[step]
            weights, speeds, loss = self._step(
                layout, weights, speeds, images[chosen], labels[chosen], rates[step]
            )
            return weights, speeds, losses.at[step].set(loss)

        start = weights, speeds, self.jax.numpy.zeros(len(rates), np.float32)
        return self.jax.lax.fori_loop(0, steps, body, start)

    # Training

    def load(self, images: Bytes, labels: Bytes) -> None:
        jax, batch = self.jax, self.setup.batch_size
        self._steps = len(labels) // batch
        state = self.parameters, self.velocity
        try:
            self._images = jax.device_put(np.ascontiguousarray(images), self.where)
            self._labels = jax.device_put(labels, self.where)
            self.layout = min(LAYOUTS, key=self._tried)
            order = np.arange(self._steps * batch) % len(labels)
            self.train(order)  # so that it is compiled
            self.train(order[:batch])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFit(str(error).partition("\n")[0]) from None
        self.parameters, self.velocity = state  # the trials have trained

    @property
    def choices(self) -> Mapping[str, object]:
        return {"layout": self.layout}

    def _tried(self, layout: str) -> float:
        """Seconds of some steps in this layout, compiled before."""
        self.layout = layout
        steps = min(TRIED_STEPS, self._steps)
        order = np.arange(steps * self.setup.batch_size)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            self._run(order, self.rates_of(steps, None))
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:])

    def train(self, order: Order, rates: Array | None = None) -> float:
        """In parts of an epoch at most."""
        batch = self.setup.batch_size
        steps = len(order) // batch
        due = self.rates_of(steps, rates)
        losses = []
        for first in range(0, steps, self._steps):
            part = min(self._steps, steps - first)
            chosen = order[first * batch : (first + part) * batch]
            losses.append(self._run(chosen, due[first : first + part]))
        self.step_losses = np.concatenate(losses)
        return float(self.step_losses.mean(dtype=np.float64))

    def _run(self, order: Order, rates: Array) -> Array:
        """Losses (steps,) of so many steps."""
        batch, steps = self.setup.batch_size, len(rates)
        whole = steps == self._steps
        chosen = np.zeros((self._steps, batch), np.int32)
        chosen[:steps] = order[: steps * batch].reshape(steps, batch)
        due = np.zeros(self._steps, np.float32)
        due[:steps] = rates
        args = self.layout, self._weights, self._speeds, self._images, self._labels
        there = self.jax.device_put((chosen, due), self.where)
        call: Callable[[], Any] = lambda: (  # noqa: E731
            self._epoch(*args, *there) if whole else self._some(*args, *there, steps)
        )
        self._weights, self._speeds, losses = call()
        return np.asarray(losses)[:steps]

    # What is compared

    def gradient(self, images: Bytes, labels: Bytes) -> tuple[float, Array]:
        loss, gradient = self.jax.value_and_grad(self._loss, argnums=1)(
            self.layout, self._weights, self._put(images), self._put(labels)
        )
        return float(loss), self._flat(gradient)

    def backward(self, images: Bytes, output_error: Array) -> Array:
        there = self._put(images)
        _, pull = self.jax.vjp(lambda w: self._outputs(self.layout, w, there), self._weights)
        (gradient,) = pull(self._put(np.asarray(output_error, np.float32)))
        return self._flat(gradient)

    def logits(self, images: Bytes) -> Array:
        batch = self.setup.batch_size
        found = np.empty((len(images), self.network.classes), np.float32)
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            # always a whole batch, so that nothing is compiled anew for the last one
            padded = np.zeros((batch, *images.shape[1:]), images.dtype)
            padded[: len(part)] = part
            outputs = self._outputs(self.layout, self._weights, self._put(padded))
            found[start : start + batch] = np.asarray(outputs)[: len(part)]
        return found

    def _put(self, array: Any) -> Any:
        return self.jax.device_put(np.ascontiguousarray(array), self.where)

    def _tensors(self, vector: Array) -> list[Any]:
        given = np.asarray(vector, np.float32)
        return [
            self.jax.device_put(given[p.offset : p.offset + p.size].reshape(p.shape), self.where)
            for p in self.network.parameters
        ]

    def _flat(self, tensors: Any) -> Array:
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
