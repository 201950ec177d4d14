"""The command `sweep`."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from cnnlib.paths import ROOT
from tests.support.command_line import Home, Start, alive, children, wait_for
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


@pytest.mark.slow
def test_sweep_measures_what_has_no_result(home: Home) -> None:
    home.write(toy_config(sweep={"stages": ["naive", "gemm"], "repeats": 2}))
    assert "results/data/toy.npz" in home.fails("sweep")
    (home.folder / "results/data").mkdir(parents=True)
    (home.folder / "toy.npz").rename(home.folder / "results/data/toy.npz")
    process = subprocess.run(
        [sys.executable, "-m", "cnnlib", "sweep"],
        cwd=home.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert [line.split(":")[0] for line in process.stdout.splitlines()] == [
        f"{number} of 4, repeat {repeat}" for number, repeat in enumerate((1, 1, 2, 2), 1)
    ]
    folder = home.folder / "results/runs/toy/small/gemm/b8/r2"
    before = (folder / "run.json").read_bytes()
    other = home.folder / "results/runs/toy/small/naive/b8/r1/run.json"
    other.unlink()
    home("sweep")
    assert other.exists()
    assert (folder / "run.json").read_bytes() == before


@pytest.mark.slow
def test_sweep_measures_again_what_is_damaged_or_stale(home: Home, start: Start) -> None:
    home.write(toy_config(sweep={"batch_sizes": [4, 8, 16]}))
    (home.folder / "results/data").mkdir(parents=True)
    shutil.copy("toy.npz", "results/data/toy.npz")

    def swept() -> tuple[str, str]:
        process = start("sweep")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out, err

    out, err = swept()
    assert (out.count("\n"), err) == (3, "")
    assert swept() == ("", "")
    runs = home.folder / "results/runs/toy/small/gemm"
    (runs / "b4/r1/run.json").write_text('{"status": "ok"')
    (runs / "b8/r1/epochs.csv").write_text("")
    shutil.rmtree(runs / "b16")
    out, err = swept()
    place = "results/runs/toy/small/gemm"
    assert err.splitlines() == [
        f"measured again: {place}/b4/r1/run.json is damaged: it is not JSON",
        f"measured again: {place}/b8/r1/epochs.csv is not what was measured",
    ]
    assert out.count("\n") == 3
    assert swept() == ("", "")
    home.write(toy_config(sweep={"batch_sizes": [4, 8, 16]}, training={"epochs": 1}))
    out, err = swept()
    assert [line.split(": ")[1] for line in err.splitlines()] == [
        f"{place}/b{size}/r1 was measured with other settings or data" for size in (4, 8, 16)
    ]
    assert out.count("\n") == 3
    assert swept() == ("", "")


@pytest.mark.parametrize("preparing", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_leaves_no_process(
    home: Home, start: Start, number: signal.Signals, preparing: int
) -> None:
    home.write(toy_config(measuring={"warmup_seconds": 600.0}, sweep={"repeats": 3}))
    (home.folder / "results/data").mkdir(parents=True)
    (home.folder / "toy.npz").rename(home.folder / "results/data/toy.npz")
    process = start("sweep", "--preparing", str(preparing))

    def below(parent: int) -> list[int]:
        return [each for child in children(parent) for each in (child, *below(child))]

    wait_for(lambda: process.poll() is not None or len(children(process.pid)) >= preparing)
    time.sleep(0.5)
    assert process.poll() is None
    assert len(children(process.pid)) == preparing
    there = below(process.pid)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert err == ("interrupted\n" if number == signal.SIGINT else "")
    wait_for(lambda: not any(map(alive, there)))
    assert os.listdir("results") == ["data"]
