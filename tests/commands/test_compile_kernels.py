"""Kernels compiled without a GPU are those that an engine asks for on one, under the same key."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cnnlib.device.architecture import H100
from cnnlib.device.cuda import compile_cubin
from cnnlib.device.null import NullDevice, NullModule
from cnnlib.engine import plans
from cnnlib.measuring.kernels_ahead import programs
from cnnlib.stages import find_stage
from cnnlib.stages.tuned import engine
from cnnlib.training.target import setup_for
from cnnlib.validation.trajectory import MOMENTUM
from tests.support.command_line import Home
from tests.support.networks import shipped
from tests.support.toys import toy_config

NVCC = """#!/bin/sh
case "$*" in *--version*) echo "release {version}"; exit;; esac
while [ "$1" != -o ]; do shift; done
echo "$2" >> {log}
{effect}
"""


class Compiling(NullDevice):
    """Computes nothing, but compiles what it is given as an H100 would have it compiled."""

    def __init__(self) -> None:
        super().__init__(H100.limits)
        self.asked: set[tuple[str, str]] = set()

    def compile(
        self, source: str, name: str, kernels: Sequence[str], flags: Sequence[str] = ()
    ) -> NullModule:
        assert not flags
        self.precompile([source], name, kernels)
        return super().compile(source, name, kernels, flags)

    def precompile(self, sources: Sequence[str], name: str, kernels: Sequence[str]) -> None:
        self.asked.update((name, source) for source in sources)
        for source in sources:
            compile_cubin(source, name, H100.sm)


class Compiler:
    """An nvcc that compiles nothing, and what it was called for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "bin").mkdir(parents=True)
        (folder / "include").mkdir()
        (folder / "include" / "cuda.h").touch()  # without it, another toolkit would be taken
        monkeypatch.setenv("CUDA_HOME", str(folder))
        monkeypatch.setenv("CNNLIB_CACHE", str(folder / "cache"))
        self.becomes('echo code > "$2"')

    def becomes(self, effect: str, version: str = "13.0") -> None:
        program = self.folder / "bin" / "nvcc"
        program.write_text(NVCC.format(version=version, log=self.log, effect=effect))
        program.chmod(0o755)

    def calls(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(tmp_path / "toolkit", monkeypatch)


def engine_on(device: Compiling, name: str, network: str, batch_size: int, momentum: float) -> None:
    """Make the engine that a measurement makes on an H100."""
    stage, built = find_stage(name, "a test"), shipped(network)
    training = toy_config().training
    setup = setup_for(training, built, batch_size, (0.0, 1.0))
    setup = replace(setup, tune=True, device_kind="cuda", momentum=momentum)
    with stage.engine(stage, setup, device):
        pass


@pytest.mark.parametrize(
    ("stage", "network", "batch_size"),
    [
        ("tuned", "lenet5", 64),
        ("tuned", "lenet5", 1024),
        ("tuned", "pytorch_examples", 1024),
        ("ring", "lenet5", 16),
    ],
)
def test_an_engine_on_the_gpu_finds_all_of_its_kernels(
    nvcc: Compiler,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    network: str,
    batch_size: int,
) -> None:
    for module in (plans, engine):  # what it measures is nothing here, and need not be trained
        monkeypatch.setattr(module, "MIN_STEPS", 1)
        monkeypatch.setattr(module, "MAX_STEPS", 1)
    device = Compiling()
    for momentum in (0.0, MOMENTUM):
        engine_on(device, stage, network, batch_size, momentum)
    due, reasons = programs(
        toy_config(), [find_stage(stage, "a test")], [shipped(network)], [batch_size], H100
    )
    assert not reasons
    assert {(each.name, each.source) for each in due} == device.asked
    # Of these only stage tuned on LeNet-5 has several plans, each with kernels of its own.
    assert (len(due) > 1) == ((stage, network) == ("tuned", "lenet5"))


def test_compiled_ahead_once(home: Home, nvcc: Compiler) -> None:
    asked = "compile-kernels", "--gpu", "H100", "--stage", "tuned", "--stage", "jax"
    asked += "--network", "small", "--batch-size", "4", "--batch-size", "300"
    said = home(*asked)
    count = nvcc.calls()
    assert count > 2
    assert f"{count} of {count}: tuned_small" in said
    assert f"{count} programs for sm_90 are in {nvcc.folder}" in said
    assert home(*asked).splitlines()[-1] == said.splitlines()[-1]
    assert nvcc.calls() == count  # all of them were there
    home(*asked[:2], "t4", *asked[3:])
    assert nvcc.calls() > count  # of another compute capability


def test_what_does_not_compile_is_named(home: Home, nvcc: Compiler) -> None:
    nvcc.becomes('echo "small.cu(3): error: no such thing" >&2; exit 1')
    asked = "compile-kernels", "--stage", "ring", "--network", "small", "--batch-size", "4", "--gpu"
    said = home(*asked, "h100", code=1)
    assert "module ring_small does not compile: small.cu(3): error: no such thing" in said
    assert "GPU 'h1000'" in home.fails(*asked, "h1000")
    assert "--processes must be at least 1" in home.fails(*asked, "h100", "--processes", "0")


def test_no_compiler(home: Home, nvcc: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnlib.device.toolkit.USUAL_PLACES", ())
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    said = home.fails("compile-kernels", "--gpu", "h100", "--stage", "tuned")
    assert "nothing can be compiled: no CUDA toolkit" in said
