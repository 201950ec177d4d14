"""The profile for sites without Slurm, through a PBS of a few lines that runs jobs at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import CONFIG
from tests.workflow.conftest import Checkout, environment

PROFILE = "workflow/profiles/cluster-generic"

# Runs the script that comes last and prints the number of the folder with its outcome. The first
# timed job is killed before it begins, and leaves only its exit status.
QSUB = """#!/bin/sh
jobs=$(dirname "$0")/../jobs; mkdir -p "$jobs"
number=$(ls "$jobs" | wc -l); job="$jobs/$number"; mkdir "$job"
for script; do :; done
echo "$*" >"$job/asked"
case "$*" in *exclhost*)
    [ -e "$jobs/../killed" ] || { touch "$jobs/../killed"; echo 271 >"$job/code"; };;
esac
[ -e "$job/code" ] || { sh "$script" >"$job/said" 2>&1; echo $? >"$job/code"; } >/dev/null &
echo "$number"
"""
QSTAT = """#!/bin/sh
for number; do :; done
job=$(dirname "$0")/../jobs/$number
[ -d "$job" ] || exit 153
if [ -s "$job/code" ]
then printf '    job_state = F\\n    Exit_status = %s\\n' "$(cat "$job/code")"
else printf '    job_state = R\\n'; fi
"""


@pytest.fixture
def pbs(tmp_path: Path) -> Path:
    """A folder with the commands of PBS."""
    folder = tmp_path / "pbs/bin"
    folder.mkdir(parents=True)
    for name, text in (("qsub", QSUB), ("qstat", QSTAT)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.slow(90)
def test_the_experiment_through_qsub(checkout: Checkout, pbs: Path) -> None:
    """Every job goes through qsub with what the profile asks for; a killed one is sent again."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "--workflow-profile",
            PROFILE,
            "--seconds-between-status-checks",
            "1",
            "--configfile",
            *CONFIG,
            "--",
            "figures",
        ],
        cwd=checkout.folder,
        text=True,
        timeout=500,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment(checkout.folder), "PATH": f"{pbs}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stdout
    assert (checkout.folder / "results/figures/speedup.png").stat().st_size > 0
    asked = [path.read_text() for path in sorted((pbs.parent / "jobs").glob("*/asked"))]
    timed = [line for line in asked if "place=exclhost" in line]
    # the probe, by which figures know the machine's limits, and two runs; one of them again
    assert len(timed) == 4
    assert done.stdout.count("Trying to restart job") == 1
    assert all("ncpus=16:" in line and "-q gpuq" in line for line in timed)
    assert {"ngpus=1" in line for line in timed} == {True, False}  # fused takes one, gemm none
    beside = [line for line in asked if line not in timed]
    assert len(beside) == 2  # the data; all tables and figures together
    assert all("place=free" in line and "ngpus=0:" in line for line in beside)


@pytest.mark.parametrize(
    ("code", "status"), [(None, "running"), (0, "success"), (1, "failed"), (271, "failed")]
)
def test_the_status_that_pbs_reports(pbs: Path, code: int | None, status: str) -> None:
    job = pbs.parent / "jobs/7"
    job.mkdir(parents=True)
    if code is not None:
        (job / "code").write_text(str(code))
    done = subprocess.run(
        ["sh", f"{PROFILE}/pbs_status.sh", "7"],
        text=True,
        stdout=subprocess.PIPE,
        check=True,
        env={"PATH": f"{pbs}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.stdout == f"{status}\n"
