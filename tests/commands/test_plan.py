"""The command `plan`: what would train a network on which GPU."""

import json
import re
from typing import Any

import pytest

from cnnlib.device.architecture import ARCHITECTURES, H100
from cnnlib.paths import ROOT
from tests.support.command_line import Home

pytestmark = pytest.mark.quick

TUNED = ("--config", str(ROOT / "config.yaml"), "--stage", "tuned")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a compiler: nothing may be built."""
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setattr("cnnlib.device.cuda.missing_parts", lambda: ["no driver"])


def plans(said: dict[str, Any]) -> list[dict[str, Any]]:
    """The plans of the first stage, of all networks."""
    return [each for network in said["networks"] for each in network["stages"][0]["plans"]]


def test_a_smaller_gpu_keeps_fewer_weights_on_chip(home: Home) -> None:
    kept = {}
    for name, gpu in ARCHITECTURES.items():
        asked = (*TUNED, "--gpu", name, "--batch-size", "64", "--batch-size", "4096")
        said = json.loads(home("plan", *asked, "--json"))
        assert said["gpu"]["multiprocessors"] == gpu.multiprocessors
        assert said["gpu"]["measured"] == (gpu is H100)
        found = [each for each in plans(said) if each["plan"] == "persistent"]
        assert [each["batch_size"] for each in found] == [64, 4096]
        for each in found:
            assert not each["unavailable"]
            assert each["trains"] == "if fastest"
            assert each["operators"][0] == "conv1+activation1+subsample1: TunedBytePlaneConv"
            assert each["shared_bytes"] <= said["gpu"]["shared_bytes"] == gpu.shared_bytes
        kept[name] = found[0]["weights_on_chip"]
    assert kept["t4"] == ["conv1", "conv2", "dense3"]
    assert kept["rtx4090"] == kept["a100"] == ["conv1", "conv2", "dense2", "dense3"]
    assert kept["h100"] == kept["b200"] == ["conv1", "conv2", "dense1", "dense2", "dense3"]


def test_what_does_not_fit_says_how_much_it_lacks(home: Home) -> None:
    on = (*TUNED, "--network", "train_mnist_fast", "--network", "simard", "--gpu")
    for gpu, declined in (("a100", 0), ("rtx4090", 1), ("t4", 1)):
        said = json.loads(home("plan", *on, gpu, "--batch-size", "16", "--json"))
        reasons = [each["unavailable"] for each in plans(said) if each["plan"] == "persistent"]
        assert len(reasons) == 2
        assert sum(map(bool, reasons)) == declined
        limit = f"{ARCHITECTURES[gpu].shared_bytes:,}"
        other = [each for each in plans(said) if each["plan"] == "graph"]
        expected = [True if reason else "if fastest" for reason in reasons]
        assert [each["trains"] for each in other] == expected
        assert {each["launch"] for each in other} == {"graph"}
        assert all(each["kernels_a_step"] > 5 for each in other)
        for reason in filter(None, reasons):
            assert re.search(rf"need [\d,]+ bytes, and a block may have {limit}", reason)


def test_the_text_says_what_the_gpu_lacks_and_what_was_never_measured(home: Home) -> None:
    asked = (*TUNED, "--batch-size", "16", "--batch-size", "1024", "--batch-size", "4096")
    said = home("plan", *asked, "--gpu", "RTX 4090")
    head, table = said.split("\n\n")[0], said.split("stage tuned")[1]
    assert head.startswith("GPU RTX 4090, by its record\n  compute capability 8.9, 128 multip")
    assert "no bulk copies with an mbarrier: copies by all threads of a block" in head
    assert "no asynchronous copies" not in head
    assert "never measured: the published times are those of an H100" in head
    assert re.search(r"^    batch size +trains +images a block", table, re.M)
    assert re.search(r"^    1024, 4096 .* [\d,]+ of 101,376 +conv1 conv2 +fp16", table, re.M)
    said = home("plan", *TUNED)
    assert said.startswith(
        "GPU H100, by its record, as there is no GPU to use here (--gpu: t4, a100, rtx4090, h100, "
        "b200)\n"
    )
    assert "never measured" not in said


def test_a_batch_too_large_for_one_plan_alone(home: Home) -> None:
    said = json.loads(home("plan", *TUNED, "--batch-size", "100000000", "--json"))
    persistent, graph = plans(said)
    assert persistent["trains"] is True
    assert graph["unavailable"].endswith("(100000000, 1, 28, 28) elements is beyond 32-bit indices")


def test_bad_input(home: Home) -> None:
    assert home.fails("plan", *TUNED, "--gpu", "gtx") == (
        f"error: unknown GPU 'gtx' in --gpu; known: {', '.join(ARCHITECTURES)}\n"
    )
    assert "--batch-size must be at least 1, not 0" in home.fails("plan", "--batch-size", "0")
    assert "unknown network 'x' in --network" in home.fails("plan", "--network", "x", "--json")
