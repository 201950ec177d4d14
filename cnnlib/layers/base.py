"""What every kind of layer defines."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from cnnlib.config_errors import first_problem
from cnnlib.errors import ConfigError

if TYPE_CHECKING:
    Checked = type
else:

    class Checked(type(BaseModel)):
        """Makes a call such as Conv(maps=0, kernel=3) raise ConfigError of one line.

        A metaclass does it because settings of a config file are read by `model_validate`, which
        makes no such call and whose errors say where in the file they are.
        """

        def __call__(cls, *values: object, **settings: object) -> "Layer":
            known = ", ".join(cls.model_fields)
            if values:
                raise ConfigError(f"{cls.__name__} takes its settings by name: {known}")
            try:
                return super().__call__(**settings)
            except ValidationError as error:
                raise ConfigError(first_problem(error, cls.__name__, cls)) from None


Shape = tuple[int, ...]
Array = NDArray[Any]
Views = dict[str, Array]


class Layer(BaseModel, ABC, metaclass=Checked):
    """One layer of a network: its formula as plain loops over one image, and its shapes.

    The loops are stage `naive` and, in float64, the reference every other stage is compared with,
    so they are written to be read, not to be fast. Arrays hold one image: (C, H, W) or (N,).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: ClassVar[str]
    """The layer's key in config.yaml."""
    shorthand: ClassVar[str]
    """The field that a bare value sets: `dense: 84` is `dense: {units: 84}`."""
    examples: ClassVar[tuple[dict[str, object], ...]] = ()
    """Settings with which tests try the layer; without any they follow from types and bounds."""

    @property
    def settings(self) -> dict[str, object]:
        """What config.yaml gives for this layer: its fields but for those left at a default."""
        return self.model_dump(exclude_defaults=True)

    @abstractmethod
    def output_shape(self, shape: Shape) -> Shape:
        """Shape of the target map; ValueError with the reason if `shape` cannot be taken."""

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]:
        """Name -> shape of each parameter, for a source map of `shape`."""
        return {}

    def fan_in(self, shape: Shape) -> int:
        """Number of inputs each unit sums over; 0 for layers without weights."""
        return 0

    def fan_out(self, shape: Shape) -> int:
        """Number of units that each input contributes to; 0 for layers without weights."""
        return 0

    def forward_flops(self, shape: Shape) -> int:
        """Floating-point operations of one image's forward pass, a multiply-add counting two.

        Only the products that dominate are counted (as is usual for rooflines): additions of a
        bias, comparisons and activation functions are not.
        """
        return 0

    @abstractmethod
    def forward(self, parameters: Views, source: Array) -> Array:
        """Target map of one image, as a new array of the source's dtype."""

    @abstractmethod
    def backward(
        self, parameters: Views, source: Array, target: Array, target_error: Array
    ) -> tuple[Array, Views]:
        """(source_error, gradients): derivatives of the loss by the source and the parameters.

        `target` is what `forward` returned for `source`, `target_error` the derivative of the loss
        by it. New arrays throughout; gradients have the keys and shapes of `parameters`.
        """


def window_counts(
    shape: tuple[int, int],
    window: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> tuple[int, int]:
    """Windows, `stride` apart, that fit in a padded map, down and across; below 1 if none does."""
    rows, columns = (
        (length + 2 * p - w) // s + 1
        for length, w, s, p in zip(shape, window, stride, padding, strict=True)
    )
    return rows, columns


def like(array: Array, shape: Shape) -> Array:
    """Zeros of `shape` in the dtype of `array`."""
    return np.zeros(shape, dtype=array.dtype)
