"""Commands that are stopped by signals, and resumed."""

import json
import os
import re
import shutil
import signal
import time

import pytest

from cnnlib.system.machine import usable_cores
from tests.support.command_line import (
    MEASURE,
    TRAIN,
    Home,
    Start,
    alive,
    changed,
    children,
    wait_for,
)
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


EPOCHS = "60"


@pytest.mark.slow
def test_a_training_survives_whatever_interrupts_it(home: Home, start: Start) -> None:
    """Ctrl-C, SIGTERM, SIGUSR1 and kill -9 leave the weights of an undisturbed training."""
    message = "stopped by {}: the training is saved in c.npz; the same command resumes it\n"
    arguments = (*TRAIN, "--epochs", EPOCHS, "--batch-size", "32")
    home(*arguments)
    expected = (home.folder / "w.npz").read_bytes()
    (home.folder / "w.npz").unlink()
    arguments = (*arguments, "--checkpoint", "c.npz")
    for epoch, number, code, said in (
        (10, signal.SIGINT, 130, "interrupted\n"),
        (20, signal.SIGTERM, 143, message.format("SIGTERM")),
        (25, signal.SIGUSR1, 138, message.format("SIGUSR1")),
        (30, signal.SIGKILL, -9, ""),
        (40, signal.SIGKILL, -9, ""),
    ):
        for _ in range(10):
            process = start(*arguments)
            reached = any(f"epoch {epoch}/{EPOCHS}" in line for line in process.stdout or ())
            workers = children(process.pid)
            if number == signal.SIGINT and reached:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            _, err = process.communicate(timeout=120)
            at_work = bool(workers) or usable_cores() == 1
            if process.returncode and at_work and not (home.folder / "w.npz").exists():
                break
            # it was at its end before it could be interrupted: once more from the beginning
            for name in ("w.npz", "c.npz"):
                (home.folder / name).unlink(missing_ok=True)
        assert at_work
        assert process.returncode == code
        assert err == said
        assert not (home.folder / "w.npz").exists()
        wait_for(lambda workers=workers: not any(map(alive, workers)))
        if number != signal.SIGKILL:  # nothing half-written is left
            assert home.names() == ["c.npz", "config.yaml", "toy.npz"]
    said = home(*arguments)
    assert "resuming from c.npz" in said
    first = re.search(r"^epoch (\d+)/", said, re.M)
    assert first is not None
    assert int(first[1]) >= 40  # printed before it is saved
    assert (home.folder / "w.npz").read_bytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_measurement_stopped_half_way_leaves_no_result(
    home: Home, start: Start, number: signal.Signals
) -> None:
    home.write(toy_config(measuring={"warmup_seconds": 600.0}))
    process = start(*changed(MEASURE, "--batch-size", "32"))
    if usable_cores() > 1:
        wait_for(lambda: process.poll() is not None or bool(children(process.pid)))
        time.sleep(0.5)
    else:
        time.sleep(5)
    assert process.poll() is None
    workers = children(process.pid)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -9)
    assert err == ("interrupted\n" if number == signal.SIGINT else "")
    wait_for(lambda: not any(map(alive, workers)))
    assert home.names() == ["config.yaml", "toy.npz"]
    home.write(toy_config())
    home(*changed(MEASURE, "--batch-size", "32"))
    assert (home.folder / "run/run.json").exists()


@pytest.mark.parametrize("alone", [False, True], ids=["the command", "its process alone"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_marked_measurement_that_is_stopped_has_not_failed(
    home: Home, start: Start, number: signal.Signals, alone: bool
) -> None:
    """With --mark, failures of stages are recorded, not requests of a person or a scheduler."""
    home.write(toy_config(measuring={"warmup_seconds": 600.0}))
    process = start(*MEASURE, "--mark")
    wait_for(lambda: process.poll() is not None or bool(children(process.pid)))
    time.sleep(0.5)
    (child,) = children(process.pid)
    os.kill(child if alone else process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert err == ("interrupted\n" if number == signal.SIGINT else "")
    wait_for(lambda: not alive(child))
    assert home.names() == ["config.yaml", "toy.npz"]


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True], ids=["the command", "its process alone"])
def test_a_full_measurement_that_is_stopped_resumes(home: Home, start: Start, alone: bool) -> None:
    measuring = {"full": True, "budget_seconds": 1e-6}
    home.write(toy_config(measuring=measuring, training={"epochs": 12}))
    command = (*changed(MEASURE, "--stage", "naive"), "--mark", "--repeat", "2")  # without a curve
    said = (
        "stopped by SIGTERM: the training is saved in results/checkpoints; the same command "
        "resumes it\n"
    )
    for pause in (0.5, 0.5, 1.0, 2.0, 4.0):
        process = start(*command)
        wait_for(lambda process=process: process.poll() is not None or children(process.pid) != [])
        time.sleep(pause)
        for child in children(process.pid):
            os.kill(child if alone else process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        if err == said:
            break
        # on a busy machine the training had not begun, or was over: once more
        assert (err, process.returncode) in (("", 143), ("", 0))
        shutil.rmtree(home.folder / "run", ignore_errors=True)
    assert err == said
    assert process.returncode == 143
    assert not (home.folder / "run").exists()
    assert list((home.folder / "results/checkpoints").rglob("*.npz"))
    home(*command)
    facts = json.loads((home.folder / "run/run.json").read_text())
    assert "failed" not in facts, facts["failed"]
    assert facts["resumed"]
    assert not list((home.folder / "results/checkpoints").rglob("*.npz"))
