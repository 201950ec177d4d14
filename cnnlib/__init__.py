"""Training a convolutional network by five stages, from plain numpy to tuned CUDA.

    network = cnnlib.Network.from_layers((1, 28, 28), 10, [...])
    trainer = cnnlib.Trainer(network, batch_size=64, learning_rate=0.1)

What __all__ names is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cnnlib import errors, layers, stages
    from cnnlib.layers import Activation, Conv, Dense, Dropout, Subsample
    from cnnlib.network import Network
    from cnnlib.trainer import Trainer
    from cnnlib.training.fit import Fit
    from cnnlib.training.records import EpochRecord, Evaluation, Progress

__all__ = [
    "Activation",
    "Conv",
    "Dense",
    "Dropout",
    "EpochRecord",
    "Evaluation",
    "Fit",
    "Network",
    "Progress",
    "Subsample",
    "Trainer",
    "__version__",
    "errors",
    "layers",
    "stages",
]

_HOMES = {
    "cnnlib.layers": ("Activation", "Conv", "Dense", "Dropout", "Subsample"),
    "cnnlib.network": ("Network",),
    "cnnlib.trainer": ("Trainer",),
    "cnnlib.training.fit": ("Fit",),
    "cnnlib.training.records": ("EpochRecord", "Evaluation", "Progress"),
}
"""Module -> what of it is exported here."""


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
