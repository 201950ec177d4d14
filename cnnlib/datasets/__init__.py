"""Data sets: what a config may ask for, how its files are fetched, checked and loaded."""

from cnnlib.datasets.download import Patience, download
from cnnlib.datasets.idx import read_idx, write_idx
from cnnlib.datasets.specs import DatasetSpec, IdxSpec, Mirror, SyntheticSpec
from cnnlib.datasets.store import (
    Dataset,
    check_hard_images,
    load,
    mean_and_deviation,
    noise,
    prepare,
    problem,
)

__all__ = [
    "Dataset",
    "DatasetSpec",
    "IdxSpec",
    "Mirror",
    "Patience",
    "SyntheticSpec",
    "check_hard_images",
    "download",
    "load",
    "mean_and_deviation",
    "noise",
    "prepare",
    "problem",
    "read_idx",
    "write_idx",
]
