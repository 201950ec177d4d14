"""Training one convolutional network through five stages, from plain numpy to tuned CUDA."""

__version__ = "0.1.0"
