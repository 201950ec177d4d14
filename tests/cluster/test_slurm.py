"""A real Slurm schedules the experiment, beside a neighbour on its GPU node, through a cancelled
job and a drained node.

Only when asked for, `pytest -m slurm tests/cluster`, as root; installs Slurm where it is missing.
"""

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cluster.conftest import CONFIG
from tests.workflow.conftest import Checkout, environment

SCRIPT = Path(__file__).parent / "slurm.sh"
PROFILE = "workflow/profiles/slurm"
CANNOT = 3
NEIGHBOUR = "neighbour"


@pytest.fixture
def slurm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Slurm with a GPU node and a CPU node, for as long as the test takes."""
    if "slurm" not in request.config.option.markexpr:
        pytest.skip("starts Slurm on this machine: only with -m slurm")
    if not importlib.util.find_spec("snakemake_executor_plugin_slurm"):
        pytest.skip("snakemake-executor-plugin-slurm is not installed (requirements/slurm.txt)")
    state = tmp_path / "slurm"
    done = subprocess.run([SCRIPT, "start", state], text=True, capture_output=True, timeout=300)
    if done.returncode == CANNOT:
        pytest.skip(f"Slurm cannot be started here: {done.stdout.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        yield
    finally:
        subprocess.run([SCRIPT, "stop", state], check=True, timeout=300)


def ask(*command: str) -> str:
    return subprocess.run(command, text=True, capture_output=True, check=True, timeout=120).stdout


def jobs() -> list[dict[str, str]]:
    """What Slurm knows of every job, by its own names."""
    return [
        dict(re.findall(r"(\w+)=(\S*)", line))
        for line in ask("scontrol", "show", "job", "--details", "--oneliner").splitlines()
        if line.startswith("JobId=") and f"JobName={NEIGHBOUR} " not in line
    ]


def visible(checkout: Checkout, stage: str) -> str | None:
    """The GPUs that the only run of a stage saw, as its run.json has them."""
    (file,) = (checkout.folder / "results/runs").glob(f"*/*/{stage}/*/*/run.json")
    return json.loads(file.read_text())["cuda_visible_devices"]


def on_gpu(state: str) -> list[dict[str, str]]:
    return [j for j in jobs() if j["Partition"] == "gpu" and j["JobState"] == state]


def wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert process.poll() is None, "the workflow ended before"
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_the_experiment_through_slurm(checkout: Checkout, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--workflow-profile",
        PROFILE,
        "--latency-wait",
        "5",
        "--configfile",
        *CONFIG,
        "--",
        "figures",
    ]
    neighbour = ask(
        "sbatch",
        "--parsable",
        "-J",
        NEIGHBOUR,
        "-p",
        "gpu",
        "--gpus=1",
        "--mem=100",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 600",
    ).strip()
    log = tmp_path / "snakemake.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=checkout.folder,
            text=True,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(checkout.folder),
        )
    try:
        wait_for(lambda: on_gpu("RUNNING"), process)
        cancelled = on_gpu("RUNNING")[0]["JobId"]
        ask("scancel", cancelled)
        ask("scontrol", "update", "NodeName=gpu1", "State=DRAIN", "Reason=test")
        wait_for(lambda: on_gpu("PENDING"), process)
        time.sleep(2)
        assert not on_gpu("RUNNING"), "a job runs on a drained node"
        ask("scontrol", "update", "NodeName=gpu1", "State=RESUME")
        assert process.wait(300) == 0
        assert "JobState=RUNNING" in ask("scontrol", "show", "job", neighbour)
    except BaseException:
        process.kill()
        print(log.read_text())
        raise
    finally:
        ask("scancel", neighbour)
    assert (checkout.folder / "results/figures/speedup.png").stat().st_size > 0
    states = {job["JobId"]: job["JobState"] for job in jobs()}
    assert states.pop(cancelled) == "CANCELLED"
    assert set(states.values()) == {"COMPLETED"}
    timed = [job for job in jobs() if job["Partition"] == "gpu" and job["JobId"] != cancelled]
    # the probe and a run of each stage; the cancelled one is among them once more
    assert len(timed) == 3
    assert {job["NodeList"] for job in timed} == {"gpu1"}
    # jobs have their part of the node alone, and no more than they asked for
    assert {(job["MinCPUsNode"], job["NumCPUs"]) for job in timed} == {("16", "16")}
    spans = sorted((job["StartTime"], job["EndTime"]) for job in timed)
    for before, after in pairwise(spans):
        assert before[1] <= after[0], "two were timed at once"
    # the probe and the GPU stage see one GPU alone: the neighbour has the other
    assert sorted(job.get("JOB_GRES", "") for job in timed) == ["(null)", "gpu:1", "gpu:1"]
    assert visible(checkout, "fused") == "1"
    others = [job for job in jobs() if job["Partition"] != "gpu"]
    assert {job["NodeList"] for job in others} == {"cpu1"}
    assert len(others) == 2  # the data; all tables and figures together
