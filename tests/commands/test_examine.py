"""Commands that look at one thing closely."""

import dataclasses
import shutil
from typing import Any

import pytest

from cnnlib import stages
from cnnlib.device import KernelError
from cnnlib.errors import ConfigError, DoesNotFit, Unsupported, WorkerDied
from cnnlib.measuring import schema
from cnnlib.stages import naive
from tests.support.command_line import MEASURE, Home, changed
from tests.support.own_stages import forgetful

pytestmark = pytest.mark.quick


def test_pictures(home: Home) -> None:
    assert "results/data/toy.npz" in home.fails("pictures", "--out", "p.csv")
    (home.folder / "results/data").mkdir(parents=True)
    shutil.copy("toy.npz", "results/data/toy.npz")
    assert home("pictures", "--out", "p.csv") == "p.csv: 3 images\n"
    found = schema.read("p.csv", "pictures")
    assert set(found["dataset"]) == {"toy"}
    assert list(found["label"]) == [0, 1, 2]  # one of each class, and no hard ones


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unsupported("weights of another size"), "unavailable"),
        (DoesNotFit("too many images"), "does_not_fit"),
        (MemoryError("too many images"), "does_not_fit"),
        (WorkerDied("a process of it ended"), "failed"),
        (KernelError("the GPU is lost"), "failed"),
        (FileNotFoundError("wheels.bin"), "failed"),
        (ConfigError("no such thing"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_cannot_be_examined_is_a_row(
    home: Home, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str | None
) -> None:
    """A mistake of the user is an error instead, and leaves no file."""

    def load(self: Any, *arguments: Any) -> None:
        raise error

    engine = type("Engine", (naive.STAGE.engine,), {"load": load})
    monkeypatch.setattr(stages, "LADDER", (dataclasses.replace(naive.STAGE, engine=engine),))
    command = ("cpu-profile", *changed(MEASURE, "--stage", "naive")[1:-1], "f.csv")
    if status is None:
        assert str(error) in home.fails(*command)
        assert not (home.folder / "f.csv").exists()
        return
    home(*command)
    (row,) = schema.read(home.folder / "f.csv", "cpu_profile").itertuples()
    assert (row.stage, row.status) == ("naive", status)


def test_profile(home: Home) -> None:
    lines = home("profile", "--stage", "gemm").splitlines()
    assert lines[0].startswith("stage gemm, network small, batch 8, on ")
    assert lines[2].split() == ["operators", "part", "a", "step", "microseconds", "share"]
    shares = [float(line.split()[-2]) for line in lines[3:]]
    assert shares == sorted(shares, reverse=True)
    assert 99 < sum(shares) < 101
    assert {line.split()[2] for line in lines[3:]} == {"forward", "backward", "loss", "update"}
    assert "unknown stage 'x' in --stage" in home.fails("profile", "--stage", "x")
    assert "unknown network 'x'" in home.fails("profile", "--stage", "gemm", "--network", "x")
    assert "--batch-size must be" in home.fails("profile", "--stage", "gemm", "--batch-size", "0")


def test_profile_of_a_loop_of_an_author(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful(monkeypatch)
    home("new-stage", "my_own", "--engine", "numpy")
    for _ in range(5):  # on a busy machine another function may be the one that waits
        lines = home("profile", "--stage", "./my_own.py").splitlines()
        assert lines[2].startswith("functions ")
        if listed := any("my_own.py:" in line and " step " in line for line in lines):
            break
    assert listed
