"""Modules that PyTorch lacks. Importing this file imports PyTorch."""

import torch
from torch import Tensor

from cnnlib.layers.activation import TANH_RATE, TANH_SCALE


class ScaledTanh(torch.nn.Module):  # type: ignore[misc]
    """1.7159 tanh(2x/3), element by element (LeCun et al. 1998)."""

    def forward(self, source: Tensor) -> Tensor:
        """Source and target have the same shape."""
        return TANH_SCALE * torch.tanh(TANH_RATE * source)


class Normalize(torch.nn.Module):  # type: ignore[misc]
    """(byte - mean) / deviation as float32, for images (N, C, H, W) of bytes or of floats 0 to 255.

    The numbers are no part of the state_dict, which holds the network's parameters alone.
    """

    def __init__(self, mean: list[float], deviation: list[float]) -> None:
        super().__init__()
        for name, numbers in (("mean", mean), ("deviation", deviation)):
            values = torch.tensor(numbers, dtype=torch.float32).reshape(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Target (N, C, H, W) float32."""
        return (images.to(torch.float32) - self.mean) / self.deviation
