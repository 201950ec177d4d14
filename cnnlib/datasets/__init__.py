"""Data sets: what a config may ask for, how its files are fetched, checked and loaded."""

from cnnlib.datasets.download import Patience, download, wrong_files
from cnnlib.datasets.folder import fingerprint
from cnnlib.datasets.idx import read_idx, write_idx
from cnnlib.datasets.prepare import mean_and_deviation, prepare
from cnnlib.datasets.sources import DataFile, Mirror
from cnnlib.datasets.specs import (
    SPECS,
    AnySpec,
    CifarSpec,
    DatasetSpec,
    FolderSpec,
    IdxSpec,
    NpzSpec,
    SyntheticSpec,
)
from cnnlib.datasets.store import Dataset, check_hard_images, load, noise, problem

__all__ = [
    "SPECS",
    "AnySpec",
    "CifarSpec",
    "DataFile",
    "Dataset",
    "DatasetSpec",
    "FolderSpec",
    "IdxSpec",
    "Mirror",
    "NpzSpec",
    "Patience",
    "SyntheticSpec",
    "check_hard_images",
    "download",
    "fingerprint",
    "load",
    "mean_and_deviation",
    "noise",
    "prepare",
    "problem",
    "read_idx",
    "write_idx",
    "wrong_files",
]
