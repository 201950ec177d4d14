"""What `make` says, in one line and with exit code 2, on a machine that lacks something."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cnnlib.paths import ROOT

pytestmark = pytest.mark.quick

COMPILER = "#!/bin/sh\n"
OLD = "sys.version_info = (3, 9, 2)"


def python(change: str) -> str:
    """Return a stand-in for Python that runs `change` before any check passed to it with -c."""
    return f"#!{sys.executable}\nimport sys, sysconfig\n{change}\nexec(sys.argv[2])\n"


class Machine:
    """A checkout, and a PATH that holds only the programs a test has put there."""

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
        """Add a program to PATH, given as the text of a script or the path of an executable."""
        path = self.programs / name
        if isinstance(what, Path):
            path.symlink_to(what)
        else:
            path.write_text(what)
            path.chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> str:
        """Run make, which must refuse, and return the only line that it prints."""
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
    machine.has("g++", COMPILER)
    assert "no Python 3.11 or newer" in machine.make("run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (OLD, "python3 is 3.9"),
        # as Debian has it until python3-venv is installed
        ("sys.version_info = (3, 12); sys.modules['ensurepip'] = None", "install python3.12-venv"),
        (
            "sys.version_info = (3, 14); sysconfig.get_path = lambda name: '/nowhere'",
            "install python3.14-dev",
        ),
    ],
)
def test_python_that_will_not_do(machine: Machine, change: str, said: str) -> None:
    machine.has("g++", COMPILER)
    machine.has("python3", python(change))
    assert said in machine.make("run")


@pytest.mark.parametrize("folders", [[], ["A=results"], ["B=results"]])
def test_a_comparison_of_fewer_than_two_folders(machine: Machine, folders: list[str]) -> None:
    assert "make compare A=results/reference/nvidia-h100 B=results" in machine.make(
        "compare", *folders
    )


def test_python_named_that_is_old(machine: Machine) -> None:
    machine.has("g++", COMPILER)
    machine.has("python3", Path(sys.executable))
    machine.has("ancient", python(OLD))
    assert "ancient is 3.9" in machine.make("run", "PYTHON=ancient")


def test_an_environment_elsewhere_is_not_emptied(machine: Machine, tmp_path: Path) -> None:
    machine.has("g++", COMPILER)
    machine.has("python3", Path(sys.executable))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/base").touch()
    (machine.checkout / ".venv").symlink_to(tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere/base", (0, 0))
    done = subprocess.run(
        [machine.programs / "make", "run"],
        cwd=machine.checkout,
        env={"PATH": str(machine.programs)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert ".venv is a link" in done.stderr
    assert (tmp_path / "elsewhere/base").exists()


def test_a_newer_python_beside_an_old_one_is_found(machine: Machine) -> None:
    machine.has("g++", COMPILER)
    machine.has("python3", python(OLD))
    machine.has("python3.12", Path(sys.executable))
    found = subprocess.run(
        ["sh", ROOT / "requirements/find_python.sh"],
        env={"PATH": str(machine.programs)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == f"{machine.programs}/python3.12\n"


@pytest.mark.parametrize(
    ("environment", "cache", "settings", "user"),
    [
        ({}, "{here}/.snakemake/cache", "{here}/.snakemake/config", "user"),
        ({"HOME": "/nowhere"}, "{here}/.snakemake/cache", "/nowhere/.config", "user"),
        ({"HOME": "/nowhere", "XDG_CACHE_HOME": "/x", "USER": "me"}, "/x", "/nowhere/.config", ""),
        ({"HOME": "{here}", "LOGNAME": "me"}, "", "", "me"),
    ],
    ids=["nothing", "a home that is not there", "another folder is named", "all is there"],
)
def test_snakemake_has_what_a_container_lacks(
    machine: Machine, environment: dict[str, str], cache: str, settings: str, user: str
) -> None:
    """A folder to write into, one for settings and a user's name: without, it ends in a traceback.

    What is there stays.
    """
    here = str(machine.checkout)
    show = "show:\n\t@echo $$XDG_CACHE_HOME:$$XDG_CONFIG_HOME:$$LOGNAME\n"
    (machine.checkout / "show.mk").write_text("include Makefile\n" + show)
    done = subprocess.run(
        [machine.programs / "make", "-f", "show.mk", "show"],
        cwd=machine.checkout,
        env={
            "PATH": str(machine.programs),
            **{name: value.format(here=here) for name, value in environment.items()},
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.strip() == f"{cache}:{settings}:{user}".format(here=here)


@pytest.mark.parametrize("lock", ["base", "cuda", "dev", "docs", "slurm", "cluster-generic"])
def test_locks_pin_with_hashes_and_name_no_address(lock: str) -> None:
    text = (ROOT / f"requirements/{lock}.txt").read_text()
    assert "://" not in text
    for entry in text.replace("\\\n", " ").splitlines():
        assert "==" in entry
        assert "--hash=sha256:" in entry


def test_help_lists_every_target() -> None:
    # `make test` itself may be running, and a make within another one says which folder it enters
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=alone,
    )
    (targets,) = re.findall(r"\.PHONY: ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text())
    listed = {line.split()[0] for line in done.stdout.split("\n\n")[0].splitlines()}
    assert set(targets.replace("\\", "").split()) == listed
    assert {"smoke", "quick", "docs", "profile", "sanitize"} <= listed


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("arguments", "said"), [((), "name a stage"), (("STAGE=tuned",), "no GPU here")]
)
def test_profiling_says_what_is_missing_before_anything_is_installed(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    for name in ("Makefile", "requirements", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        ["make", "profile", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_hosted_ci_calls_what_a_contributor_can_call() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    called = " ".join(step.get("run", "") for step in steps)
    for command in ("make lint", "make docs", "make test", "cnnlib check", ".ci/workflow"):
        assert command in called
        assert command in (ROOT / ".ci/run").read_text()
    for step in steps:
        # a tag can be moved, a commit cannot
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + "0" * 40))


def test_hooks_call_pinned_tools() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    locked = "".join((ROOT / f"requirements/{name}.txt").read_text() for name in ("base", "dev"))
    for hook in repository["hooks"]:
        program = hook["entry"].split()[0]
        if program != "make":
            assert program.startswith(".venv/bin/")
            assert f"\n{Path(program).name}==" in f"\n{locked}"
