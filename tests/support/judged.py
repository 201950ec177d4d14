"""A data set and a network small enough to be judged in seconds."""

from pathlib import Path

import yaml

from cnnlib.config import Config, load_config
from cnnlib.datasets import prepare
from tests.support.toys import toy_config


def judged_files(folder: Path) -> tuple[Config, Path]:
    """Write a config.yaml and a data set with epochs of 75 steps, which take milliseconds."""
    settings = toy_config(
        sweep={"batch_sizes": [16], "device": "emulated"}, measuring={"warmup_seconds": 0.02}
    ).model_dump(mode="json")
    settings["datasets"]["toy"] |= {"train_images": 1200, "shape": [1, 12, 12]}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    config = load_config([folder / "config.yaml"])
    prepare("toy", config.datasets["toy"], folder, folder / "toy.npz")
    return config, folder / "toy.npz"
