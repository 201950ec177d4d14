"""The wheel: built, installed and used outside the checkout, as a user has it."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import cnnlib
from cnnlib.paths import INSTALLED, ROOT

LIGHT = {"numpy", "pydantic", "pandas", "scipy", "typer", "yaml", "PIL", "torch", "cnnlib.network"}
"""Modules that `import cnnlib` alone must not import."""

TEN_LINES = """
import numpy as np
import cnnlib

images = np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8)
labels = (images[:, :4].mean(axis=(1, 2)) > images[:, 4:].mean(axis=(1, 2))).astype(int)
layers = [{"conv": {"maps": 2, "kernel": 3}}, {"activation": "relu"}, {"dense": 2}]
network = cnnlib.Network.from_layers((1, 8, 8), 2, layers)
for stage in ("gemm", "fused"):
    trainer = cnnlib.Trainer(network, stage=stage, batch_size=16, device=DEVICES[stage])
    for epoch in trainer.fit(images, labels, epochs=3):
        print(stage, epoch.epoch, f"{epoch.loss:.4f}")
    trainer.save("w.npz")
"""

SNIPPET = """
import numpy as np
import cnnlib

network = cnnlib.Network.from_layers((1, 28, 28), 10, [cnnlib.Dense(units=10)])
images, labels = np.zeros((100, 28, 28), np.uint8), np.zeros(100, np.int64)
with cnnlib.Trainer(network, stage="gemm", batch_size=64, learning_rate=0.1) as trainer:
    losses: list[float] = [epoch.loss for epoch in trainer.fit(images, labels, epochs=2)]
    accuracy: float = trainer.evaluate(images, labels).accuracy
    first: int = int(trainer.predict(images)[0])
    trainer.save("w.npz")
again: cnnlib.Trainer = cnnlib.Trainer.load("w.npz", stage="gemm")
"""

MISTAKE = 'cnnlib.Trainer(network, stage=3)\ntrainer.fit(images, labels, epochs="two")\n'

pytestmark = pytest.mark.skipif(INSTALLED, reason="these tests build the package from a checkout")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", folder, ROOT]
    subprocess.run(command, check=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package alone; what it depends on is in the tests' environment."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel]
    subprocess.run(command, check=True, timeout=120)
    return folder


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(site: Path, tmp_path: Path) -> Run:
    """Runs a program in an empty folder where only the installed package is found."""

    def start(*command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
        environment["PATH"] = f"{site / 'bin'}:{environment['PATH']}"
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, done.stderr
        return done

    return start


def test_the_wheel_has_the_kernels_the_types_and_the_config(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        config = archive.read("cnnlib/config.yaml")
    expected = {
        f"cnnlib/{path.relative_to(ROOT)}"
        for pattern in ("*.cuh", "*.cpp", "*.hpp")
        for path in (ROOT / "kernels").rglob(pattern)
    }
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "cnnlib").rglob("*.py")}
    texts = {str(path.relative_to(ROOT)) for path in (ROOT / "cnnlib/exercises/texts").iterdir()}
    assert len(expected) > 20
    assert len(texts) > 5
    assert {*expected, *modules, *texts, "cnnlib/py.typed", "cnnlib/commit.txt"} <= names
    assert config == (ROOT / "config.yaml").read_bytes()
    assert {name.split("/")[0] for name in names} == {
        "cnnlib",
        f"cnnlib-{cnnlib.__version__}.dist-info",
    }


def test_what_cnnlib_imports_is_what_it_depends_on() -> None:
    """Each library that a module imports at its top is among the dependencies, and pinned too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {re.split(r"[<>=\[;]", each)[0] for each in project["dependencies"]}
    modules = {"PIL": "pillow", "yaml": "pyyaml", "pydantic_core": "pydantic"}
    found = set()
    # Functions import this module, where PyTorch is installed.
    optional = {ROOT / "cnnlib/torch_modules/modules.py"}
    for path in set((ROOT / "cnnlib").rglob("*.py")) - optional:
        if path.parent.name == "starts":
            continue  # what new-stage writes; it is imported nowhere
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"(?:from|import) (\w+)", line):
                found.add(match[1])
    foreign = {modules.get(name, name) for name in found - set(sys.stdlib_module_names)}
    assert {name.replace("_", "-") for name in foreign} - {"cnnlib"} <= named
    pinned = (ROOT / "requirements/base.in").read_text(encoding="utf-8")
    assert all(re.search(rf"(?m)^{name}\b", pinned) for name in named)


def test_importing_it_is_cheap(run: Run) -> None:
    found = run(sys.executable, "-c", "import cnnlib, sys; print(*sys.modules)").stdout.split()
    assert not LIGHT & set(found)
    where = run(sys.executable, "-c", "import cnnlib; print(cnnlib.__file__)").stdout
    assert not where.startswith(str(ROOT))


def test_ten_lines_train_by_a_cpu_stage_and_by_emulated_kernels(run: Run, tmp_path: Path) -> None:
    devices = "DEVICES = dict(gemm='cpu', fused='emulated')\n"
    (tmp_path / "train.py").write_text(devices + TEN_LINES)
    lines = run(sys.executable, "train.py").stdout.split("\n")
    losses = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line}
    for epoch in (1, 2, 3):
        assert losses[f"gemm {epoch}"] == pytest.approx(losses[f"fused {epoch}"], abs=2e-4)
    assert (tmp_path / "w.npz").exists()


def test_the_command_of_its_name_has_a_config(run: Run, tmp_path: Path, site: Path) -> None:
    assert run("cnnlib", "--version").stdout == f"cnnlib {cnnlib.__version__}\n"
    said = run("cnnlib", "plan", "--stage", "ring")
    assert "network lenet5" in said.stdout
    shipped = site / "cnnlib" / "config.yaml"
    assert said.stderr == f"config: {shipped}, as there is no config.yaml in {tmp_path}\n"
    (tmp_path / "config.yaml").write_text("results: [1]\n")
    assert run("cnnlib", "plan", code=2).stderr.startswith("error: config.yaml")
    assert "Usage: cnnlib plan" in run("cnnlib", "plan", "--help").stdout
    assert "gone.yaml" in run("cnnlib", "plan", "--config", "gone.yaml", code=2).stderr


def test_it_knows_the_commit_that_it_was_built_from(run: Run) -> None:
    code = "from cnnlib.system.machine import commit; print(commit())"
    built = run(sys.executable, "-c", code).stdout.strip()
    here = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert built == here.stdout.strip()


@pytest.mark.slow
def test_mypy_sees_the_types_in_a_users_program(run: Run, tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(SNIPPET)
    (tmp_path / "wrong.py").write_text(SNIPPET + MISTAKE)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    assert "Success" in run(*mypy, "right.py").stdout
    said = run(*mypy, "wrong.py", code=1).stdout
    assert re.findall(r"wrong\.py:\d+: error: .*\[(.*)\]", said) == ["arg-type", "arg-type"]
