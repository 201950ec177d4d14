"""What `make` says, in one line and with exit code 2, on a machine that lacks something."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLD = "#!/bin/sh\ncase $2 in *python_version*) echo 3.9.2;; *) exit 1;; esac\n"
# as Debian has it without python3-venv: a whole Python, but nothing that makes environments
BARE = f"#!/bin/sh\ncase $2 in *ensurepip*) exit 1;; *) exec '{sys.executable}' \"$@\";; esac\n"


class Machine:
    """A checkout and a PATH that holds only the programs put there."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.checkout = folder / "a checkout"
        self.checkout.mkdir()
        shutil.copy(ROOT / "Makefile", self.checkout)
        shutil.copytree(ROOT / "requirements", self.checkout / "requirements")
        for name in ("sh", "make"):
            self.has(name, Path(str(shutil.which(name))))

    def has(self, name: str, what: str | Path) -> None:
        """Put a program there: a script's text, or the path of a program."""
        path = self.programs / name
        if isinstance(what, Path):
            path.symlink_to(what)
        else:
            path.write_text(what)
            path.chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> str:
        """The only line that make prints when it refuses."""
        done = subprocess.run(
            [self.programs / "make", *arguments],
            cwd=self.checkout,
            env={"PATH": str(self.programs), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2, done
        assert not done.stdout
        (line,) = done.stderr.splitlines()
        assert not (self.checkout / ".venv").exists()
        return line


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("goal", ["run", "test"])
def test_no_compiler(machine: Machine, goal: str) -> None:
    machine.has("python3", Path(sys.executable))
    assert "no C++ compiler" in machine.make(goal)


def test_compiler_named_that_is_not_there(machine: Machine) -> None:
    machine.has("python3", Path(sys.executable))
    assert "CXX=g++-99" in machine.make("run", CXX="g++-99 -m64")


def test_no_python(machine: Machine) -> None:
    machine.has("g++", OLD)
    assert "no Python 3.11 or newer" in machine.make("run")


def test_old_python(machine: Machine) -> None:
    machine.has("g++", OLD)
    machine.has("python3", OLD)
    assert "python3 is 3.9.2" in machine.make("run")


def test_python_without_venv(machine: Machine) -> None:
    machine.has("g++", OLD)
    machine.has("python3", BARE)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"apt-get install python{version}-venv" in machine.make("run")


def test_python_named_that_is_old(machine: Machine) -> None:
    machine.has("g++", OLD)
    machine.has("python3", Path(sys.executable))
    machine.has("ancient", OLD)
    assert "ancient is 3.9.2" in machine.make("run", "PYTHON=ancient")


def test_a_newer_python_beside_an_old_one_is_found(machine: Machine) -> None:
    machine.has("g++", OLD)
    machine.has("python3", OLD)
    machine.has("python3.12", Path(sys.executable))
    found = subprocess.run(
        ["sh", ROOT / "requirements/find_python.sh"],
        env={"PATH": str(machine.programs)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == f"{machine.programs}/python3.12\n"


@pytest.mark.parametrize("lock", ["base", "cuda", "dev"])
def test_locks_pin_with_hashes_and_name_no_address(lock: str) -> None:
    text = (ROOT / f"requirements/{lock}.txt").read_text()
    assert "://" not in text
    for entry in text.replace("\\\n", " ").splitlines():
        assert "==" in entry
        assert "--hash=sha256:" in entry
