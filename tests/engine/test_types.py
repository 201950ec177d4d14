"""A record that pairs an engine with another engine's operators or options does not pass mypy."""

import subprocess
import sys

import pytest

from cnnlib.paths import ROOT

pytestmark = pytest.mark.slow

HEAD = """
from dataclasses import replace
from cnnlib.engine import Stage
from cnnlib.engine.cpu import MicroBatchEngine
from cnnlib.engine.gpu import GpuEngine
from cnnlib.engine.gpu_operator import GpuOptions
from cnnlib.layers import Conv
from cnnlib.stages import gemm, gemm_cuda, naive, ring, tuned
"""
RECORD = 'Stage("mine", "mine", "nothing", "cpu", {engine}, {{(Conv,): {operator}}})'


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What mypy says of each record, by the record; all are checked by one run."""
    records = [*RIGHT, *WRONG]
    file = tmp_path_factory.mktemp("typed") / "records.py"
    file.write_text(HEAD + "".join(f"stage{i} = {text}\n" for i, text in enumerate(records)))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--no-error-summary",
            "--no-color-output",
            "--hide-error-context",
            "--cache-dir",
            str(file.parent / "cache"),
            str(file),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    first = HEAD.count("\n") + 1
    found = dict.fromkeys(records, "")
    for line in done.stdout.splitlines():
        where, _, problem = line.partition(": error: ")
        assert where.startswith(str(file)), done.stdout + done.stderr
        found[records[int(where.rpartition(":")[2]) - first]] += problem
    return found


RIGHT = [
    RECORD.format(engine="MicroBatchEngine", operator="gemm.MatrixConv"),
    RECORD.format(engine="GpuEngine", operator="gemm_cuda.GemmConv"),
    RECORD.format(
        engine="GpuEngine",
        operator="lambda planned, stage, limits: gemm_cuda.GemmConv(planned, stage, limits)",
    ),
    "replace(ring.STAGE, options=GpuOptions(error_slots=3))",
]
WRONG = [
    RECORD.format(engine="MicroBatchEngine", operator="gemm_cuda.GemmConv"),
    RECORD.format(engine="GpuEngine", operator="gemm.MatrixConv"),
    RECORD.format(engine="GpuEngine", operator="naive.Loops"),
    RECORD.format(engine="naive.OneByOne", operator="gemm.MatrixConv"),
    "replace(gemm.STAGE, operators=gemm_cuda.STAGE.operators)",
    "replace(tuned.PERSISTENT, operators=ring.STAGE.operators)",
    "replace(ring.STAGE, options={'error_slots': 3})",
    "replace(ring.STAGE, options=GpuOptions(error_slots='three'))",
]


@pytest.mark.parametrize("record", RIGHT)
def test_a_record_of_one_engine_passes(verdicts: dict[str, str], record: str) -> None:
    assert verdicts[record] == ""


@pytest.mark.parametrize("record", WRONG)
def test_a_record_of_two_engines_does_not_pass(verdicts: dict[str, str], record: str) -> None:
    assert verdicts[record]
    problems = ("incompatible type", 'Cannot infer value of type parameter "Op" of "Stage"')
    assert any(problem in verdicts[record] for problem in problems)
