"""The command `judge`: stages of one's own that are right, kernels that are not, bad input."""

import csv
import json
from pathlib import Path

import pytest

from cnnlib.__main__ import main
from cnnlib.config import load_config
from cnnlib.device import sanitizer_environment
from cnnlib.errors import DeviceError
from cnnlib.judging import emulation, rivals
from cnnlib.stages import gemm_cuda
from cnnlib.validation.verdicts import ValidationFailed
from tests.support.command_line import Home, Start, read_until
from tests.support.judged import judged_files

MINE = """
from dataclasses import replace
from cnnlib.stages import gemm
STAGE = replace(gemm.STAGE, name="mine", title="My own", threads=1)
"""

KERNEL = """
#pragma once
#include "layers.cuh"
#define MINE_KERNELS(layer) \\
  ENTRY_POINT(layer, activate)(const float* source, float* target, int count) { \\
    for (int i : grid_range(count * layer::SIZE)) \\
      target[i] = activate<layer::FUNCTION>(source[i]); \\
  } \\
  ENTRY_POINT(layer, activate_backward) \\
  (const float* source, const float* target, const float* target_errors, float* source_errors, \\
   int count) { \\
    for (int i : grid_range(count * layer::SIZE)) \\
      source_errors[i] = target_errors[i] * slope<layer::FUNCTION>(source[i], target[i]); \\
  }
"""

OPERATOR = """
from dataclasses import replace
from cnnlib.layers import Activation
from cnnlib.stages import gemm_cuda

class Mine(gemm_cuda.GemmActivation):
    file = "mine.cuh"

OPERATORS = {**gemm_cuda.STAGE.operators, (Activation,): Mine}
STAGE = replace(gemm_cuda.STAGE, name="kernel", title="My kernel", operators=OPERATORS)
"""


def can_sanitize() -> bool:
    try:
        return bool(sanitizer_environment())
    except DeviceError:
        return False


@pytest.fixture
def folder(home: Home) -> Path:
    judged_files(home.folder)
    return home.folder


JUDGE = ("--data", "toy.npz", "--repeats", "2", "--out", "out")


def facts(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "out/judge.json").read_text())
    return found


def words(folder: Path) -> dict[str, str]:
    return {part["name"]: part["word"] for part in facts(folder)["parts"]}  # type: ignore[attr-defined]


def test_a_stage_of_ones_own(home: Home, folder: Path) -> None:
    (folder / "mine.py").write_text(MINE)
    said = home("judge", "./mine.py", *JUDGE)
    assert "mine: right" in said
    assert "engine MicroBatchEngine has no kernels" in said
    found = words(folder)
    assert (found["check"], found["tricks"], found["emulation"]) == ("right", "right", "not done")
    assert (found["times"], found["roofline"]) == ("measured", "measured")
    with open(folder / "out/times.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["stage"], row["repeat"]) for row in rows} == {
        (stage, repeat) for stage in ("mine", "gemm") for repeat in ("1", "2")
    }
    (ratio,) = facts(folder)["ratios"]  # type: ignore[misc]
    assert ratio["low"] <= ratio["factor"] <= ratio["high"]
    page = (folder / "out/page.html").read_text()
    assert "mine against the ladder" in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "http" not in page  # nothing is loaded from elsewhere

    # Judged again, nothing is reused: a part that is no longer made has left nothing behind.
    (folder / "mine.py").write_text(MINE.replace("threads=1", "threads=1, slack=1e6"))
    said = home("judge", "./mine.py", *JUDGE, code=1)
    assert "out: the earlier judgement there is removed" in said
    assert words(folder)["tricks"] == "REJECTED"
    assert not (folder / "out/times.csv").exists()


def test_kernels_of_ones_own(home: Home, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "awkward_networks", list)  # the compiler takes a while for each
    monkeypatch.setattr(rivals, "LADDER", [gemm_cuda.STAGE])
    if not can_sanitize():
        pytest.skip("there are no sanitizers here")
    (folder / "kernel.py").write_text(OPERATOR)
    (folder / "mine.cuh").write_text(KERNEL)
    assert main(["judge", "./kernel.py", *JUDGE]) == 0, facts(folder)["verdict"]
    assert words(folder)["emulation"] == "right"
    assert words(folder)["times"] == "measured"
    assert "no peer is comparable here" in json.dumps(facts(folder))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        # an index beyond the end, which shows in no result
        ("target[i] =", "target[i] = 0 * source[i ? 0 : count * layer::SIZE] +", "buffer-overflow"),
        # whichever thread comes last decides
        (
            "target[i] =",
            "target[(i + 1) % (count * layer::SIZE)] = target[i] =",
            "races on network",
        ),
    ],
)
def test_wrong_kernels(home: Home, folder: Path, old: str, new: str, why: str) -> None:
    if not can_sanitize():
        pytest.skip("there are no sanitizers here")
    (folder / "kernel.py").write_text(OPERATOR)
    (folder / "mine.cuh").write_text(KERNEL.replace(old, new))
    network = load_config([folder / "config.yaml"]).network("small", "toy", "test")
    with pytest.raises(ValidationFailed, match=why):
        emulation.check_emulated("./kernel.py", [network], folder, 60)


def test_images_are_made_where_there_are_none(home: Home, folder: Path) -> None:
    (folder / "mine.py").write_text(MINE)
    home("judge", "./mine.py", "--no-rivals", "--part", "check", "--out", "out")
    assert words(folder)["check"] == "right"
    config = load_config([folder / "config.yaml"])
    (dataset,) = config.sweep.datasets
    assert (folder / config.results / "data" / f"{dataset}.npz").exists()


def test_bad_input(home: Home, folder: Path) -> None:
    assert "there is no file" in home.fails("judge", "./none.py", *JUDGE)
    assert "unknown stage 'gem'" in home.fails("judge", "gem", *JUDGE)
    (folder / "broken.py").write_text("import nothing_of_that_name\n")
    assert "./broken.py" in home.fails("judge", "./broken.py", *JUDGE)
    assert "--images must be from 16" in home.fails("judge", "gemm", *JUDGE, "--images", "3")
    assert "known: check, tricks" in home.fails("judge", "gemm", *JUDGE, "--part", "chck")
    assert "unknown stage 'gem' in --against" in home.fails(
        "judge", "gemm", *JUDGE, "--against", "gem"
    )
    assert "--repeats must be at least 1" in home.fails("judge", "gemm", "--repeats", "0")
    assert "unknown network" in home.fails("judge", "gemm", *JUDGE, "--network", "large")
    assert "none.npz" in home.fails("judge", "gemm", "--data", "none.npz")
    assert not (folder / "out").exists()
    (folder / "out").mkdir()
    (folder / "out/page.html").write_text("an earlier one")
    home.fails("judge", "./broken.py", *JUDGE)
    assert (folder / "out/page.html").read_text() == "an earlier one"


def test_chosen_parts_and_rivals(home: Home, folder: Path) -> None:
    (folder / "mine.py").write_text(MINE)
    (folder / "other.py").write_text(MINE.replace('"mine"', '"other"'))
    chosen = ("--part", "check", "--part", "times", "--no-rivals", "--against", "./other.py")
    home("judge", "./mine.py", *JUDGE, *chosen)
    assert words(folder) == {"check": "right", "times": "measured"}
    (ratio,) = facts(folder)["ratios"]  # type: ignore[misc]
    assert ratio["other"]["name"] == "./other.py"
    assert "peer" not in json.dumps(facts(folder)["parts"][1])  # type: ignore[index]


def test_an_interrupted_judgement_keeps_what_is_finished(start: Start, folder: Path) -> None:
    (folder / "mine.py").write_text(MINE)
    process = start("judge", "./mine.py", *JUDGE)
    read_until(process, "check: right")
    process.terminate()
    assert process.wait(120) == 143
    assert words(folder)["check"] == "right"
    assert facts(folder)["verdict"] == "unfinished: no check has rejected it so far"
    page = (folder / "out/page.html").read_text()
    assert "unfinished" in page


def test_a_network_that_the_stage_does_not_serve(home: Home, folder: Path) -> None:
    (folder / "few.py").write_text(
        MINE.replace("threads=1", "operators={}").replace('"mine"', '"few"')
    )
    assert "has no operator for conv1" in home.fails("judge", "./few.py", *JUDGE)
