"""The tutorial is run as it is written: its files, its commands, its claims."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cnnlib.paths import ROOT

PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")


def written() -> dict[str, str]:
    """Every file of the page."""
    found = re.findall(r"(?ms)^```\{code-block\} \w+\n:caption: (\S+)\n\n(.*?)^```", PAGE)
    assert found
    return dict(found)


def commands() -> list[str]:
    return re.findall(r"(?m)^    (python -m cnnlib .*)$", PAGE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tutorial")
    for name, text in written().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(folder: Path, command: str) -> str:
    arguments = shlex.split(command)
    assert arguments[0] == "python"
    done = subprocess.run(
        [sys.executable, *arguments[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def test_the_stage_has_fewer_than_60_lines() -> None:
    code = [line for line in written()["loops.py"].splitlines() if line.strip()]
    assert len(code) < 60


@pytest.mark.slow(25)
def test_as_it_is_written(folder: Path) -> None:
    said = {command.split()[3]: run(folder, command) for command in commands()}
    assert set(said) == {"prepare", "check", "profile", "judge"}
    assert said["check"].splitlines()[1].split()[-1] == "ok"
    # The functions that the page calls slow are so.
    slowest = [line for line in said["profile"].splitlines() if "%" in line][:4]
    for name in ("back", "convolve"):
        assert any(re.search(rf"loops\.py:\d+ {name} ", line) for line in slowest), slowest
    reshapes = re.search(r"method 'reshape' of \S+ objects +(\d+)", said["profile"])
    assert reshapes
    assert int(reshapes[1]) > 900
    # The page promises about four times; a busy machine is no reason to fail.
    facts = json.loads((folder / "results/judge/windows/judge.json").read_text())
    gains = {ratio["other"]["name"]: ratio["factor"] for ratio in facts["ratios"]}
    assert facts["verdict"] == "right"
    assert gains["./loops.py"] > 1.5
    assert (folder / "results/judge/windows/page.html").is_file()


def test_a_mistake_is_found(folder: Path) -> None:
    wrong = written()["loops.py"].replace("(1 - target * target)", "(1 - target)")
    assert wrong != written()["loops.py"]
    (folder / "wrong.py").write_text(wrong)
    done = subprocess.run(
        [sys.executable, "-m", "cnnlib", "check", "--stage", "./wrong.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "the gradient of conv1.weight at batch size 8 is off by" in done.stderr
