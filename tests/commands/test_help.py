"""Help, and commands that are mistyped."""

import re
import subprocess
import sys

import pytest

from cnnlib.__main__ import app
from cnnlib.paths import ROOT
from tests.support.command_line import Home, Start

pytestmark = pytest.mark.quick


def commands(*, hidden: bool) -> list[str]:
    """Names of the commands that the help lists, or of those that it does not list."""
    return [
        command.name or command.callback.__name__.replace("_", "-")
        for command in app.registered_commands
        if command.callback is not None and command.hidden == hidden
    ]


def test_help_lists_all_commands(home: Home) -> None:
    said = home()
    assert said == home("--help")
    assert {"train", "measure", "cpu-profile", "plan"} <= {*commands(hidden=False)}
    for command in commands(hidden=False):
        assert re.search(rf"^  {command} ", said, re.M), command
        assert f"Usage: python -m cnnlib {command}" in home(command, "--help")


def test_former_names_of_commands_still_work(home: Home) -> None:
    assert "functions" in commands(hidden=True)
    for command in commands(hidden=True):
        assert not re.search(rf"^  {command} ", home(), re.M)
        assert f"Usage: python -m cnnlib {command}" in home(command, "--help")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv[1:] = ['train', '--help']; import cnnlib.__main__ as m; m.main();"
        "heavy = {'numpy', 'pandas', 'yaml', 'PIL', 'tqdm'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--epoch", "3"], "No such option"),
        (["train", "--epochs", "three"], "'--epochs'.*integer"),
        (["train", "--epochs"], "requires an argument"),
        (["measure"], "Missing option"),
        (["predict"], "Missing argument"),
        (["stages", "extra"], "unexpected extra argument"),
        (["--verbose"], "No such option"),
    ],
)
def test_mistyped_commands(home: Home, arguments: list[str], problem: str) -> None:
    assert re.search(problem, home.fails(*arguments))


def test_a_reader_that_leaves_is_no_error(home: Home, start: Start) -> None:
    """The reader of `python -m cnnlib plan | head -1` closes the pipe early."""
    process = start("plan")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(30) in (0, 1)
