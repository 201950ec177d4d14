"""The stages of examples/stages train as the reference does; libraries that are not here are faked
by numpy, or skip the test.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from cnnlib.datasets import noise
from cnnlib.engine import Setup, Stage
from cnnlib.paths import ROOT
from cnnlib.stages import find_stage
from cnnlib.training.target import Target
from cnnlib.validation.trajectory import check_training
from tests.support.networks import build

STAGES = ROOT / "examples/stages"


def layers(*more: dict[str, object]) -> list[object]:
    return [
        {"conv": {"maps": 3, "kernel": 4, "stride": 2}},
        {"activation": "relu"},
        *more,
        {"dense": 6},
        {"activation": "tanh"},
        {"dense": 4},
    ]


def check(stage: Stage, *more: dict[str, object], kind: str = "cpu") -> float:
    network = build("small", (1, 12, 12), 4, layers(*more))
    data = noise("noise", network.input_shape, 4, 65)
    setup = Setup(network, 8, 0.05, 0.5, mean=data.mean, deviation=data.deviation)
    return check_training(stage, setup, Target("here", kind), data, 1)


def test_every_stage_is_tried() -> None:
    assert {path.stem for path in STAGES.glob("*.py")} == {"pytorch_loop", "cupy_loop"}


def test_pytorch() -> None:
    if find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    stage = find_stage(str(STAGES / "pytorch_loop.py"), "test")
    assert check(stage, {"subsample": {"size": 2, "method": "mean"}}) < 1


def test_cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CuPy needs a GPU. It has numpy's functions under numpy's names, so that numpy stands in."""
    monkeypatch.setitem(sys.modules, "cupy", np)
    copy = tmp_path / "cupy_copy.py"
    text = (STAGES / "cupy_loop.py").read_text(encoding="utf-8")
    copy.write_text(text.replace('"cupy_loop"', '"cupy_copy"'))
    assert check(find_stage(str(copy), "test"), kind="cuda") < 1
