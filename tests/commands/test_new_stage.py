"""The command `new-stage`, and what it writes."""

import subprocess
import sys
from pathlib import Path

import pytest

from cnnlib.commands.new_stage import ENGINES
from cnnlib.paths import ROOT
from cnnlib.stages import LADDER
from tests.support.command_line import Home
from tests.support.own_stages import forgetful
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick

STARTS = [("--from", stage.name) for stage in LADDER] + [("--engine", name) for name in ENGINES]


@pytest.fixture
def mine(home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    forgetful(monkeypatch)
    home.write(toy_config(sweep={"batch_sizes": [7], "device": "emulated"}))
    return home


@pytest.mark.parametrize("start", STARTS, ids=lambda start: start[1])
def test_a_start_passes_check_as_it_is(mine: Home, start: tuple[str, str]) -> None:
    said = mine("new-stage", "my_own", *start)
    assert said.endswith("check it: cnnlib check --stage ./my_own.py\n")
    code = 0
    if start[1] == "torch":
        try:
            import torch  # noqa: F401
        except ImportError:
            code = 1
    said = mine("check", "--stage", "./my_own.py", code=code)
    if code:
        assert said == "stage 'my_own' needs torch, which is not installed (./my_own.py, line 12)\n"
    else:
        assert said.splitlines()[1].split()[::5] == ["my_own", "ok"]


def test_the_usual_start_is_short(mine: Home) -> None:
    mine("new-stage", "my_own")
    text = Path("my_own.py").read_text()
    assert len(text.splitlines()) <= 45
    assert "from cnnlib.stages import ring\n" in text


def test_starts_are_typed_and_in_the_common_layout(mine: Home) -> None:
    """An author who checks types sees no errors in code that others have written."""
    names = [f"my_{start[1]}" for start in STARTS]
    for name, start in zip(names, STARTS, strict=True):
        mine("new-stage", name, *start)
    files = [f"{name}.py" for name in names]
    config = f"--config-file={ROOT / 'pyproject.toml'}"
    for command in (
        ["mypy", "--strict", config, "--cache-dir=.mypy_cache"],
        ["ruff", "format", f"--config={ROOT / 'pyproject.toml'}", "--check", "--no-cache"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command, *files],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT), "PATH": ""},
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_written_over(mine: Home) -> None:
    Path("my_own.py").write_text("mine")
    assert "my_own.py exists already" in mine.fails("new-stage", "my_own")
    assert Path("my_own.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["my-own"], "'my-own' cannot be the name of a stage: it must be made of English letters"),
        (["../x"], "'../x' cannot be the name of a stage"),
        (["_x"], "'_x' cannot be the name of a stage"),
        (["größe"], "cannot be the name of a stage"),
        (["x" * 101], "have at most 100 characters"),
        (["class"], "'class' cannot be the name of a stage: it is a word of Python"),
        (["ring"], "'ring' is the name of a stage of cnnlib; choose another"),
        (["x", "--from", "rign"], "unknown stage 'rign' in --from; known: naive, gemm, gemm_cuda"),
        (["x", "--from", "torch"], "unknown stage 'torch' in --from; known: naive"),
        (["x", "--engine", "jax"], "unknown library 'jax' in --engine; known: numpy, torch"),
    ],
)
def test_bad_input(mine: Home, arguments: list[str], problem: str) -> None:
    before = mine.names()
    assert problem in mine.fails("new-stage", *arguments)
    assert mine.names() == before
