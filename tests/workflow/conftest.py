"""A finished run of the tiny experiment in a folder of its own; ways to call Snakemake there."""

import os
import shutil
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from cnnlib.paths import ROOT
from tests.support.ahead import Ahead, Program, begins
from tests.support.snakemakes import SNAKEMAKE
from workflow.glue import modules

PARTS = ("Snakefile", "config.yaml", "cnnlib", "kernels", "workflow", "tests/tiny.yaml")


def digest(path: Path) -> str:
    """SHA-256 of a file: two files are compared without printing their difference."""
    return sha256(path.read_bytes()).hexdigest()


def usual(folder: str) -> list[str]:
    """The figures or tables that are not about certain stages alone."""
    names = modules.names(folder)
    return [name for name in names if not modules.constant(folder, name, "STAGES")]


def jobs(text: str) -> dict[str, int]:
    """Rule -> number of jobs, of what a dry run has printed."""
    found = {}
    if "Job stats:" in text:
        for line in text.partition("Job stats:")[2].splitlines()[3:]:
            if not line.strip() or line.startswith("total"):
                break
            name, count = line.split()
            found[name] = int(count)
    return found


@dataclass
class Checkout:
    """A copy of what the workflow needs, so that a test can edit a stage or break a config."""

    folder: Path

    def command(self, *arguments: str, config: str | None = "tests/tiny.yaml") -> list[str]:
        return [sys.executable, "-m", "snakemake", *self.options(*arguments, config=config)]

    def options(self, *arguments: str, config: str | None = "tests/tiny.yaml") -> list[str]:
        return ["--cores", "2", *arguments, *(["--configfile", config] if config else [])]

    def snakemake(
        self, *arguments: str, config: str | None = "tests/tiny.yaml", code: int | None = 0
    ) -> str:
        """Run Snakemake; what it printed. It must end with `code` (None: with an error)."""
        options = self.options(*arguments, config=config)
        found, said = SNAKEMAKE.call(options, self.folder, environment(self.folder), timeout=600)
        wrong = found == 0 if code is None else found != code
        assert not wrong, f"exit code {found}\n{said}"
        return said

    def planned(self, *arguments: str, config: str | None = "tests/tiny.yaml") -> dict[str, int]:
        """Rule -> number of jobs that a call would run."""
        return jobs(self.snakemake("--dry-run", *arguments, config=config))

    def copy(self, folder: Path) -> "Checkout":
        """Another one in the same state, times of files included."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Checkout(folder)

    def edit(self, name: str) -> None:
        """A change to the file that changes nothing of what it does."""
        with open(self.folder / name, "a", encoding="utf-8") as out:
            out.write("# edited\n")


def environment(folder: Path) -> dict[str, str]:
    """An environment without the user's profiles, and with a lock for measurements of its own."""
    scratch = folder.parent / "tmp"
    scratch.mkdir(exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SNAKEMAKE_")}
    return {**kept, "TMPDIR": str(scratch)}


def make_checkout(folder: Path) -> Checkout:
    """A checkout in `folder`, in which nothing has been run."""
    for part in PARTS:
        source, target = ROOT / part, folder / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            # compiled modules too, but none that another process is writing just now
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.pyc.*"))
        else:
            shutil.copy2(source, target)
    return Checkout(folder)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which nothing has been run."""
    return make_checkout(tmp_path_factory.mktemp("fresh") / "checkout")


@begins("printed")
def begin(folder: Path) -> Program:
    """The tiny experiment in a checkout of its own."""
    made = make_checkout(folder / "checkout")
    return Program(made.command("all"), made.folder, environment(made.folder))


@pytest.fixture(scope="session")
def printed(ahead: Ahead) -> str:
    """The output of the run in `finished`."""
    code, text = ahead["printed"].end()
    assert code == 0, f"exit code {code}\n{text}"
    return text


@pytest.fixture(scope="session")
def finished(ahead: Ahead, printed: str) -> Checkout:
    """A checkout in which the tiny experiment has been run; not to be changed."""
    return Checkout(ahead["printed"].folder)


@pytest.fixture
def mine(finished: Checkout, tmp_path: Path) -> Checkout:
    """A copy of `finished` that the test may change."""
    return finished.copy(tmp_path / "checkout")
