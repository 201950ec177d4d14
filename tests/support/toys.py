"""A data set and a network that train in milliseconds, a small disk and a read-only folder."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from cnnlib.config import Config
from cnnlib.datasets import Dataset, load, prepare
from cnnlib.measuring.runs import parse_experiment

SETTINGS: dict[str, Any] = {
    "datasets": {
        "toy": {
            "kind": "synthetic",
            "shape": [1, 8, 8],
            "classes": 3,
            "train_images": 90,
            "test_images": 30,
        }
    },
    "networks": {
        "small": [
            {"conv": {"maps": 2, "kernel": 3}},
            {"activation": "relu"},
            {"subsample": 2},
            {"dense": 3},
        ]
    },
    "training": {"learning_rate": 0.1, "momentum": 0.5, "epochs": 2},
    "sweep": {
        "datasets": ["toy"],
        "networks": ["small"],
        "stages": ["gemm"],
        "batch_sizes": [8],
        "repeats": 1,
    },
    "measuring": {
        "warmup_seconds": 0.01,
        "latency_steps": 3,
        "budget_seconds": 20.0,
        "budget_images": 4,
    },
}


def toy_config(**sections: dict[str, Any]) -> Config:
    """SETTINGS with some of them changed, as in toy_config(training={"epochs": 1}).

    With a short measuring.limit_seconds the other times are shorter still, as they have to be.
    """
    settings = SETTINGS | {name: SETTINGS[name] | changes for name, changes in sections.items()}
    if limit := sections.get("measuring", {}).get("limit_seconds"):
        shorter = dict.fromkeys(
            ("budget_seconds", "sample_seconds", "emulated_seconds", "energy_seconds"), limit / 2
        )
        settings["measuring"] |= shorter | sections["measuring"]
    return parse_experiment(settings)


def toy_data(folder: Path, config: Config | None = None) -> tuple[Path, Dataset]:
    """The file of the toy data set, made in `folder`, and its contents."""
    spec = (config or toy_config()).datasets["toy"]
    prepare("toy", spec, folder, folder / "toy.npz")
    return folder / "toy.npz", load("toy", folder / "toy.npz", spec)


def write_config(path: Path, config: Config) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Make `folder` a file system of 64 KiB; skips the test where mounting is not permitted."""
    with mounted(folder, "size=64k"):
        yield folder


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Make `folder` one in which nothing can be written; for root, whom permissions do not bind, a
    file system that is read-only (skips the test where mounting is not permitted).
    """
    if not os.geteuid():
        with mounted(folder, "size=64k,ro"):
            yield folder
        return
    folder.mkdir(mode=0o500)
    try:
        yield folder
    finally:
        folder.chmod(0o700)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"this user may not mount a file system: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
