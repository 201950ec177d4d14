"""Thousands of runs: planning and collecting take time in proportion to their number, no more.

docs/reliability.md has the seconds that ten thousand took.
"""

import resource
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from cnnlib.measuring import schema
from tests.workflow.conftest import Checkout, environment

pytestmark = pytest.mark.slow

LINEAR, QUADRATIC = 4, 16
"""Factors by which four times as many runs take longer, if linear or quadratic."""
ALLOWED = 8


def planning_seconds(checkout: Checkout, repeats: int) -> float:
    """Processor time of a dry run of a sweep with 50 runs per repeat, start and end included."""
    settings = yaml.safe_load((checkout.folder / "tests/tiny.yaml").read_text())
    del settings["race"]
    dense = settings["networks"]["tiny"]
    settings["networks"] = {f"n{i}": dense for i in range(5)}
    settings["sweep"] |= {
        "networks": list(settings["networks"]),
        "batch_sizes": [1, 2, 4, 8, 16],
        "stages": ["naive", "gemm"],
        "repeats": repeats,
    }
    (checkout.folder / "many.yaml").write_text(yaml.safe_dump(settings))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        checkout.command("--dry-run", "--quiet", "all", "all", config="many.yaml"),
        cwd=checkout.folder,
        env=environment(checkout.folder),
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime - before.ru_utime


def test_planning_is_linear(fresh: Checkout, tmp_path: Path) -> None:
    checkout = fresh.copy(tmp_path / "checkout")
    start, few, many = (planning_seconds(checkout, repeats) for repeats in (1, 8, 32))
    ratio = (many - start) / (few - start)
    assert ratio < ALLOWED, f"1600 runs took {ratio:.1f} times as long as 400"


def test_collecting_is_linear(tmp_path: Path) -> None:
    row = {
        "dataset": "d",
        "network": "n",
        "stage": "gemm",
        "device": "CPU, 2 threads",
        "batch_size": 8,
        "seed": 1,
        "step_seconds": 0.5,
        "device_kind": "cpu",
        "status": "ok",
        "validated": True,
        "extrapolated": False,
    }
    paths = [tmp_path / f"{repeat}.csv" for repeat in range(1, 1601)]
    for repeat, path in enumerate(paths, 1):
        rows = [row | {"repeat": repeat, "step": step} for step in range(1, 11)]
        schema.write(path, "steps", rows)

    def seconds(count: int) -> float:
        began = time.process_time()
        assert schema.combine(paths[:count], "steps", tmp_path / "all.csv") == 10 * count
        return time.process_time() - began

    few, many = (min(seconds(count) for _ in range(3)) for count in (400, 1600))
    assert many / few < ALLOWED
