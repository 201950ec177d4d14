"""Stage 1: one thread, one image at a time, plain loops, a new array for every result.

This is how a student writes it first, in numpy's default float64. The loops are the layers' own
(cnnlib/layers), which are also the reference that every other stage is compared with.
"""

import statistics
import time
from collections.abc import Iterator

import numpy as np

from cnnlib.device import Device
from cnnlib.engine import (
    Bytes,
    Engine,
    ImageByImage,
    KernelTime,
    Order,
    Setup,
    Stage,
    profile_operators,
)
from cnnlib.layers import KINDS, MASK, Array, Dropout, Layer, Views
from cnnlib.levels import for_maps


class Loops:
    """Applies one layer's own loops to one image."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def forward(self, parameters: Views, source: Array) -> Array:
        return self.layer.forward(parameters, source)

    def backward(
        self, parameters: Views, source: Array, target: Array, target_error: Array
    ) -> tuple[Array, Views]:
        return self.layer.backward(parameters, source, target, target_error)


class OneByOne(ImageByImage, Engine[type[Loops]]):
    """Trains image by image, adding up the gradient of the whole batch before its one update."""

    def __init__(
        self, stage: Stage[type[Loops]], setup: Setup, device: Device | None = None
    ) -> None:
        super().__init__(stage, setup, device)
        self.operators: list[Loops] = [p.operator(p.layers[0]) for p in self.plan]
        self._parameters = np.zeros(self.network.parameter_count, stage.dtype)
        self._velocity = np.zeros_like(self._parameters)
        self._clear()

    def load(self, images: Bytes, labels: Bytes) -> None:
        self._images, self._labels = images, labels

    def train(self, order: Order, rates: Array | None = None) -> float:
        size = self.setup.batch_size
        losses = []
        for step, rate in enumerate(self.rates_of(len(order) // size, rates)):
            batch = order[step * size : (step + 1) * size]
            loss, gradient = self.gradient(self._images[batch], self._labels[batch])
            self.update(gradient, rate)
            self._steps += 1
            losses.append(loss)
        return float(np.mean(losses))

    def train_images(self, order: Order, rates: Array | None = None) -> float:
        size, losses = self.setup.batch_size, 0.0
        steps = (self._added + len(order)) // size
        due = iter(self.rates_of(steps, rates))
        for image, label in zip(self._images[order], self._labels[order], strict=True):
            self._add(image, label)
            if self._added == size:
                self.update(self._sum / size, next(due))
                self._steps += 1
                losses += self._loss_sum / size
                self._clear()
        return losses

    @property
    def unfinished(self) -> Array:
        """Gradient and loss, summed over the images of the step so far, and the number of these."""
        return np.concatenate([self._sum, [self._loss_sum, self._added]])

    @unfinished.setter
    def unfinished(self, vector: Array) -> None:
        if vector.shape != (len(self._parameters) + 2,) or vector.dtype != self._parameters.dtype:
            raise ValueError("a gradient of another network")
        self._sum, self._loss_sum = vector[:-2].copy(), float(vector[-2])
        self._added = int(vector[-1])

    def _clear(self) -> None:
        self._sum, self._loss_sum, self._added = np.zeros_like(self._parameters), 0.0, 0

    def _add(self, image: Bytes, label: int) -> None:
        """Add the gradient and the loss of an image to the sums of the step."""
        loss, gradient = self._image_gradient(image, label, self._added)
        self._sum = self._sum + gradient
        self._loss_sum += loss
        self._added += 1

    def _image_gradient(self, image: Bytes, label: int, position: int) -> tuple[float, Array]:
        """Loss and flat gradient of the image at this position of its batch."""
        views = self._views(position)
        maps = list(self._forward(image, views))
        loss, error = self.setup.loss_function.one(maps[-1].reshape(-1), int(label))
        return loss, self._backward(maps, error, views)

    def _views(self, position: int | None = None) -> list[Views]:
        """What each layer is given besides its source: its parameters, and in training its mask.

        `position` is that of the image in its batch, or None where nothing is trained.
        """
        views = self.network.views(self._parameters)
        if position is not None:
            for i, layer in enumerate(self.network.layers):
                if isinstance(layer, Dropout):
                    views[i][MASK] = self.setup.mask(i, self._steps, position)
        return views

    def update(self, gradient: Array, rate: float) -> None:
        """One step of gradient descent on the flat parameter vector."""
        if self.setup.weight_decay:
            gradient = gradient + self.setup.weight_decay * self._parameters
        self._velocity = self.setup.momentum * self._velocity + gradient
        self._parameters = self._parameters - self._parameters.dtype.type(rate) * self._velocity

    def time_update(self) -> float:
        gradient = np.zeros_like(self._parameters)
        times = []
        for _ in range(20):
            began = time.perf_counter()
            self.update(gradient, self.setup.learning_rate)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def profile(self) -> list[KernelTime]:
        size = self.setup.batch_size
        saved = self.parameters, self.velocity
        nothing = np.zeros_like(self._parameters)
        rows = profile_operators(
            self.setup,
            self.plan,
            self.operators,
            step=lambda: self.gradient(self._images[:size], self._labels[:size]),
            update=lambda: self.update(nothing, self.setup.learning_rate),
        )
        self.parameters, self.velocity = saved
        return rows

    def gradient(self, images: Bytes, labels: Bytes) -> tuple[float, Array]:
        total, loss_sum = np.zeros_like(self._parameters), 0.0
        for position, (image, label) in enumerate(zip(images, labels, strict=True)):
            loss, found = self._image_gradient(image, label, position)
            total = total + found
            loss_sum += loss
        return loss_sum / len(images), total / len(images)

    def backward(self, images: Bytes, output_error: Array) -> Array:
        total = np.zeros_like(self._parameters)
        for position, (image, error) in enumerate(zip(images, output_error, strict=True)):
            views = self._views(position)
            total = total + self._backward(list(self._forward(image, views)), error, views)
        return total

    def logits(self, images: Bytes) -> Array:
        outputs = np.empty((len(images), self.network.classes), self.stage.dtype)
        views = self._views()
        for output, image in zip(outputs, images, strict=True):
            *_, last = self._forward(image, views)
            output[:] = last.reshape(-1)
        return outputs

    def _forward(self, image: Bytes, views: list[Views]) -> Iterator[Array]:
        """Yield the source of the first layer, then the target of each layer."""
        dtype = self._parameters.dtype
        maps = (image - for_maps(self.setup.mean, dtype)) / for_maps(self.setup.deviation, dtype)
        yield maps
        for operator, given in zip(self.operators, views, strict=True):
            maps = operator.forward(given, maps)
            yield maps

    def _backward(self, maps: list[Array], output_error: Array, views: list[Views]) -> Array:
        """Flat gradient of one image from its maps and the derivative by its logits."""
        gradient = np.zeros_like(self._parameters)
        gradients = self.network.views(gradient)
        error = output_error.astype(self._parameters.dtype).reshape(maps[-1].shape)
        for i in reversed(range(len(self.operators))):
            error, found = self.operators[i].backward(views[i], maps[i], maps[i + 1], error)
            for key, values in found.items():
                gradients[i][key][...] = values
        return gradient

    @property
    def parameters(self) -> Array:
        return self._parameters.copy()

    @parameters.setter
    def parameters(self, vector: Array) -> None:
        self._parameters = np.array(vector, dtype=self.stage.dtype)

    @property
    def velocity(self) -> Array:
        return self._velocity.copy()

    @velocity.setter
    def velocity(self, vector: Array) -> None:
        self._velocity = np.array(vector, dtype=self.stage.dtype)


STAGE = Stage(
    name="naive",
    title="1 naive",
    change="plain loops over maps and positions in numpy, one image at a time, one thread",
    runs_on="cpu",
    engine=OneByOne,
    color="#111111",
    marker="o",
    operators={(kind,): Loops for kind in KINDS.values()},
    dtype=np.float64,
    threads=1,
)
