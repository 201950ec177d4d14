"""The command line, called within the tests or in a process of its own."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cnnlib.__main__ import main
from cnnlib.config import Config
from tests.support.toys import toy_config, toy_data, write_config


class Home:
    """A folder with a config and data, in which commands are called."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capture = capture
        self.config = toy_config()
        self.write(self.config)
        toy_data(folder)

    def write(self, config: Config) -> None:
        self.config = config
        write_config(self.folder / "config.yaml", config)

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run a command, expect exit code `code`, and return stdout, or stderr unless that is 0."""
        self.capture.readouterr()
        found = main(list(arguments))
        out, err = self.capture.readouterr()
        assert found == code, err
        return err if code else out

    def fails(self, *arguments: str) -> str:
        """Run a command that must be refused in one line."""
        said = self(*arguments, code=2)
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder))


Start = Callable[..., subprocess.Popen[str]]


TRAIN = ("train", "--data", "toy.npz", "--out", "w.npz")


MEASURE = (
    "measure",
    "--dataset",
    "toy",
    "--network",
    "small",
    "--stage",
    "gemm",
    "--batch-size",
    "8",
    "--data",
    "toy.npz",
    "--out",
    "run",
)


def changed(arguments: tuple[str, ...], option: str, value: str) -> tuple[str, ...]:
    """The arguments with another value of one option, or with the option added."""
    if option not in arguments:
        return (*arguments, option, value)
    i = arguments.index(option)
    return (*arguments[: i + 1], value, *arguments[i + 2 :])


def weights(path: Path | str) -> np.ndarray:
    with np.load(path) as saved:
        return saved["parameters"]


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Read lines of the process's output up to the first one with `text`."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended before it printed {text!r}: {process.communicate()}")


def children(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait up to two minutes for the condition, on a busy machine too."""
    ends = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < ends, "it never came true"
        time.sleep(0.02)
