"""A stage in another process: what it raises, how it ends, and what it leaves behind."""

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cnnlib.engine import Engine, Setup
from cnnlib.errors import BrokenStage, ConfigError, DeviceError
from cnnlib.judging.messages import receive, send
from cnnlib.judging.remote import StageFailed, Worker
from cnnlib.judging.tools import (
    check_compute_sanitizer,
    count,
    first_report,
    read_counters,
)
from cnnlib.stages import gemm
from cnnlib.training.target import open_engine
from cnnlib.validation.verdicts import ValidationFailed
from tests.support.command_line import alive, wait_for
from tests.support.engines import pictures
from tests.support.networks import small

pytestmark = pytest.mark.quick

HEAD = """
import os, subprocess, sys, time
from dataclasses import replace
from cnnlib.stages import gemm

class Mine(gemm.STAGE.engine):
    def train(self, order, rates=None):
        {body}
        return super().train(order, rates)

STAGE = replace(gemm.STAGE, name="mine", engine=Mine)
"""

Opened = Callable[[str], Worker]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    def opened(body: str) -> Worker:
        (tmp_path / "mine.py").write_text(HEAD.format(body=body))
        return Worker(str(tmp_path / "mine.py"), "emulated")

    return opened


@contextmanager
def opened_engine(worker: Worker) -> Iterator[Engine]:
    """An engine of the other process that has loaded a batch."""
    setup = Setup(small(), 4, 0.05, mean=33.3, deviation=78.6)
    with open_engine(worker.stage, setup, worker.target) as engine:
        engine.load(*pictures(small(), 4))
        yield engine


def train(worker: Worker) -> None:
    """One step in the other process."""
    with opened_engine(worker) as engine:
        engine.train(np.arange(4))


def test_it_computes_the_same_there(opened: Opened) -> None:
    setup = Setup(small(), 4, 0.05, mean=33.3, deviation=78.6, momentum=0.5)
    images, labels = pictures(small(), 12)
    here = gemm.STAGE.engine(gemm.STAGE, setup)
    with opened("pass") as worker, here, open_engine(worker.stage, setup, worker.target) as there:
        results = []
        for engine in (here, there):
            engine.parameters = engine.network.initial_parameters(1)
            engine.load(images, labels)
            loss = engine.train(np.arange(12))
            loss_now, gradient = engine.gradient(images[:4], labels[:4])
            vectors = engine.parameters, engine.velocity, gradient, engine.logits(images)
            results.append([loss, loss_now, *(vector.tobytes() for vector in vectors)])
        assert results[0] == results[1]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('of no use')", "stage 'mine' raises ValueError: of no use"),
        ("sys.exit(4)", "stage 'mine' raises SystemExit: 4"),
        ("os._exit(3)", "stage 'mine' ended its process with exit code 3"),
        ("print('a last word', flush=True); os.abort()", "killed by SIGABRT: a last word"),
        ("os.killpg(0, 9)", "killed by SIGKILL"),
    ],
)
def test_how_it_fails(opened: Opened, body: str, said: str) -> None:
    with opened(body) as worker, pytest.raises(StageFailed, match=said):
        train(worker)


def test_one_that_hangs(opened: Opened) -> None:
    # The limit holds for `train` alone: on a busy machine anything else may take as long.
    body = "time.sleep(60)"
    with opened(body) as worker, opened_engine(worker) as engine:
        worker.limit = 0.5
        with pytest.raises(StageFailed, match="hangs: 'train' took longer than 0.5 s"):
            engine.train(np.arange(4))
    assert worker.process.returncode is not None


def test_nothing_is_left_running(opened: Opened, tmp_path: Path) -> None:
    note = tmp_path / "note"
    sleeper = "subprocess.Popen(['sleep', '77'], start_new_session=True).pid"
    with opened(f"open({str(note)!r}, 'w').write(str({sleeper}))") as worker:
        train(worker)
        left = int(note.read_text())
        assert alive(left)
    wait_for(lambda: not alive(left))


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def half(:\n")
    with (
        pytest.raises(BrokenStage, match="line 1"),
        Worker(str(tmp_path / "broken.py"), "emulated"),
    ):
        pass
    (tmp_path / "ends.py").write_text("import os\nprint('so long')\nos._exit(5)\n")
    with (
        pytest.raises(StageFailed, match="exit code 5"),
        Worker(str(tmp_path / "ends.py"), "emulated"),
    ):
        pass


def test_messages_hold_numbers_only() -> None:
    one, other = socket.socketpair()
    with one, other:
        arrays = [np.arange(6).reshape(2, 3), np.zeros(0, np.float32), np.float64(2.5)]
        send(one, {"do": "this"}, [np.asarray(array) for array in arrays])
        head, found = receive(other)
        assert head == {"do": "this"}
        for sent, got in zip(arrays, found, strict=True):
            assert np.array_equal(np.asarray(sent), got)
        send(one, {}, [np.array(["text"])])
        with pytest.raises(ValueError, match="an array of"):
            receive(other)
    one, other = socket.socketpair()
    with one, other:
        one.sendall((1 << 40).to_bytes(8, "little"))
        with pytest.raises(ValueError, match="a message of"):
            receive(other)
        one.close()
        with pytest.raises(EOFError):
            receive(other)


NCU = """==PROF== Connected to process 7
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","conv1_forward(const float *)","gpu__time_duration.sum","nsecond","12,000"
"0","conv1_forward(const float *)","dram__bytes.sum","Kbyte","500"
"1","conv1_forward(const float *)","gpu__time_duration.sum","usecond","14"
"1","update(float *)","gpu__time_duration.sum","usecond","3"
"1","update(float *)","something.else","","1"
"""


SANITIZED = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void conv1_forward(const float *)+0x50 in mine.cuh:12
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error
"""


def test_reports_of_compute_sanitizer_are_read(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a print of the stage\n" + SANITIZED)
    assert first_report(tmp_path / "log") == (
        "Invalid __global__ read of size 4 bytes "
        "at void conv1_forward(const float *)+0x50 in mine.cuh:12"
    )
    (tmp_path / "log").write_text("========= ERROR SUMMARY: 0 errors\nInvalid\n")
    assert first_report(tmp_path / "log") == ""


def test_counters_are_read(tmp_path: Path) -> None:
    (tmp_path / "ncu.csv").write_text(NCU)
    first, second = read_counters(tmp_path / "ncu.csv")
    assert (first.kernel, first.launches, first.values[:2]) == ("conv1_forward", 2, [13.0, 0.5])
    assert (second.kernel, second.values[0]) == ("update", 3.0)
    assert read_counters(tmp_path / "none.csv") == []


def test_an_unknown_stage_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="unknown stage 'gem' in judge"):
        Worker("gem", "emulated").__enter__()


TOOL = """#!/bin/sh
# Options come first, then Python's own command line.
while [ "$1" != {python} ]; do
  [ "$1" = --log-file ] && table=$2
  shift
done
"$@" || exit 1
{afterwards}
"""


def tool(folder: Path, afterwards: str) -> str:
    """A stand-in for one of NVIDIA's tools, which runs a program and then does something."""
    script = folder / "tool"
    script.write_text(TOOL.format(python=sys.executable, afterwards=afterwards))
    script.chmod(0o755)
    return str(script)


def test_a_process_under_compute_sanitizer(tmp_path: Path) -> None:
    quiet = tool(tmp_path, "echo '========= ERROR SUMMARY: 0 errors'")
    check_compute_sanitizer(quiet, "gemm", small(), tmp_path, 60, "emulated")
    assert "0 errors" in (tmp_path / "compute-sanitizer-racecheck.log").read_text()
    loud = tool(tmp_path, "echo '========= Error: Race reported'; exit 97")
    with pytest.raises(ValidationFailed, match="under memcheck: Error: Race reported"):
        check_compute_sanitizer(loud, "gemm", small(), tmp_path, 60, "emulated")


def test_a_process_under_ncu(tmp_path: Path) -> None:
    (tmp_path / "given.csv").write_text(NCU)
    counting = tool(tmp_path, f"cp {tmp_path}/given.csv $table")
    found = count(counting, "gemm", small(), 4, tmp_path / "ncu.log", 60, "emulated")
    assert [counter.kernel for counter in found] == ["conv1_forward", "update"]
    (tmp_path / "given.csv").write_text("==ERROR== ERR_NVGPUCTRPERM\n")
    with pytest.raises(DeviceError, match="ncu gives no counters: ==ERROR== ERR_NVGPUCTRPERM"):
        count(counting, "gemm", small(), 4, tmp_path / "ncu.log", 60, "emulated")
