"""The command `train`: what it writes, prints and refuses."""

import dataclasses
import fcntl
import os
import pty
import re
import shutil
import termios
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cnnlib.__main__ import main
from cnnlib.commands import training
from cnnlib.exchange.formats import load_weights, save_weights
from cnnlib.stages import find_stage
from cnnlib.training.loop import train_epochs
from cnnlib.training.target import open_engine, open_target, setup_of
from tests.support.command_line import TRAIN, Home, Start, weights
from tests.support.toys import SETTINGS, toy_config, toy_data

pytestmark = pytest.mark.quick


def test_train_prints_and_writes(home: Home) -> None:
    said = home(*TRAIN, "--epochs", "3")
    assert [line.split(":")[0] for line in said.splitlines()[1:]] == [
        "epoch 1/3",
        "epoch 2/3",
        "epoch 3/3",
        "weights",
    ]
    assert "by stage gemm, batch 8" in said
    assert re.search(r"test accuracy \d+\.\d\d %", said)
    assert home.names() == ["config.yaml", "toy.npz", "w.npz"]


def test_train_writes_the_format_of_the_ending(home: Home) -> None:
    home(*TRAIN)
    home("train", "--data", "toy.npz", "--out", "w.safetensors")
    np.testing.assert_array_equal(load_weights("w.safetensors").parameters, weights("w.npz"))
    said = home.fails("train", "--data", "toy.npz", "--out", "w.h5")
    assert "w.h5: weights are in files that end in one of .safetensors, .npz" in said
    assert home.names() == ["config.yaml", "toy.npz", "w.npz", "w.safetensors"]


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".onnx"])
def test_train_from_weights(home: Home, ending: str) -> None:
    """At a constant rate without momentum, twice one epoch is the same whatever file is between."""
    home.write(toy_config(training={"momentum": 0.0}))
    first, then = (f"{name}{ending}" for name in ("a", "b"))
    train = ["train", "--data", "toy.npz", "--epochs", "1"]
    home(*train, "--out", first)
    said = home(*train, "--from", first, "--out", then, "--seed", "5")
    assert f"from {first}, trained for 11 steps before\n" in said
    before, after = load_weights(first), load_weights(then)
    assert (before.steps, after.steps) == (11, 22)
    assert after.origin["from"] == first
    settings = toy_config(training={"momentum": 0.0})
    network = settings.network("small", "toy", "here")
    data = toy_data(home.folder)[1]
    with (
        open_target(find_stage("gemm", "here")) as target,
        open_engine(
            find_stage("gemm", "here"), setup_of(settings, network, data, 8), target, data
        ) as engine,
    ):
        engine.parameters = before.parameters
        list(train_epochs(engine, 90, 1, 5))
        np.testing.assert_array_equal(after.parameters, engine.parameters)


def test_train_from_weights_with_another_normalisation(home: Home) -> None:
    """Weights go on seeing what they have learned to see."""
    home(*TRAIN, "--epochs", "1")
    trained = dataclasses.replace(load_weights("w.npz"), mean=1.5, deviation=99.0)
    save_weights("other.safetensors", trained)
    home(*TRAIN, "--from", "other.safetensors")
    found = load_weights("w.npz")
    assert (found.mean, found.deviation) == (1.5, 99.0)


def test_train_from_weights_of_another_network(home: Home) -> None:
    home(*TRAIN, "--epochs", "1")
    layers = SETTINGS["networks"]["small"]
    tanh = [{"activation": "tanh"} if "activation" in layer else layer for layer in layers]
    home.write(toy_config(networks={"tanh": tanh, "flat": [{"dense": 3}]}))
    home("train", "--data", "toy.npz", "--from", "w.npz", "--network", "tanh", "--out", "t.npz")
    assert load_weights("t.npz").network.name == "tanh"
    said = home.fails(*TRAIN, "--from", "w.npz", "--network", "flat")
    assert (
        "w.npz, for network 'flat': tensor dense1.weight has shape (3, 18), expected (3, 64)"
        in said
    )
    save_file(load_weights("w.npz").tensors, "bare.safetensors")
    said = home.fails(*TRAIN, "--from", "bare.safetensors")
    assert "name it by --network; known: " in said
    home(*TRAIN, "--from", "bare.safetensors", "--network", "small")


def test_options_of_train(home: Home) -> None:
    home.write(toy_config(sweep={"stages": ["gemm"], "batch_sizes": [4, 8]}))
    home(*TRAIN)
    plain = weights("w.npz")
    home(*TRAIN, "--batch-size", "4", "--stage", "gemm", "--seed", "1", "--epochs", "2")
    np.testing.assert_array_equal(weights("w.npz"), plain)
    home(*TRAIN, "--stage", "naive")
    np.testing.assert_allclose(weights("w.npz"), plain, atol=1e-5)
    for option, value in (("--batch-size", "8"), ("--seed", "2"), ("--epochs", "1")):
        home(*TRAIN, option, value)
        assert np.abs(weights("w.npz") - plain).max() > 1e-3, option
    with np.load("w.npz") as saved:
        assert '"epochs": 1' in saved["origin"].item()


def test_train_needs_nothing_but_a_config(home: Home) -> None:
    """Data and weights are where the workflow puts them, and missing data are made."""
    said = home("train")
    assert home.names() == ["config.yaml", "results", "toy.npz"]
    assert (home.folder / "results/data/toy.npz").exists()
    assert said.endswith("weights: results/weights.npz\n")
    made = (home.folder / "results/data/toy.npz").stat().st_mtime_ns
    home("train", "--epochs", "1")
    assert (home.folder / "results/data/toy.npz").stat().st_mtime_ns == made


@pytest.mark.parametrize("change", ["seed", "shape of labels", "damage", "older version"])
def test_train_replaces_data_that_are_not_those_of_the_config(home: Home, change: str) -> None:
    """One line says why; an earlier version trained on the old data without a word."""
    home("train")
    made, spec = home.folder / "results/data/toy.npz", home.config.datasets["toy"]
    before, trained = made.read_bytes(), weights("results/weights.npz")
    if change == "damage":
        made.write_bytes(before[:-100])
    elif change == "older version":
        with np.load(made) as saved:
            np.savez(made, **{key: saved[key] for key in saved.files if key not in NEW})
    else:
        other = {"seed": 2} if change == "seed" else {"train_images": 80}
        home.write(toy_config(datasets={"toy": spec.model_dump() | other}))
    capture = home.capture
    capture.readouterr()
    assert main(["train"]) == 0
    line = capture.readouterr().err
    assert line.count("\n") == 1
    assert str(Path("results/data/toy.npz")) in line
    assert line.endswith("; it is made again\n")
    same = change in ("damage", "older version")
    assert (made.read_bytes() == before) == same
    assert np.array_equal(weights("results/weights.npz"), trained) == same
    if not same:
        fresh = weights("results/weights.npz")
        shutil.rmtree("results")
        home("train")
        assert np.array_equal(weights("results/weights.npz"), fresh)


NEW = {"specification", "digest"}


def test_train_replaces_data_of_other_files(home: Home) -> None:
    """Files with other checksums are a reason, but not another mirror of the same files."""
    from tests.support.mirrors import arrays, spec_of, write_files

    content = arrays(train=60, test=20, side=8, classes=3)
    homes = [write_files(home.folder / name, content) for name in ("one", "same")]
    content[1] = content[1][::-1].copy()  # images of the same mean, with other labels
    homes.append(write_files(home.folder / "other", content))
    found = []
    for folder in homes:
        spec = spec_of(folder, [{"folder": str(folder)}], shape=[1, 8, 8], classes=3)
        home.write(toy_config(datasets={"toy": spec.model_dump()}))
        home("train")
        made = (home.folder / "results/data/toy.npz").stat().st_mtime_ns
        found.append((made, weights("results/weights.npz")))
    assert found[0][0] == found[1][0], "another mirror is no reason"
    assert found[1][0] != found[2][0]
    assert not np.array_equal(found[1][1], found[2][1])


def test_later_configs_go_over_earlier(home: Home) -> None:
    (home.folder / "more.yaml").write_text("training: {epochs: 1}")
    said = home(*TRAIN, "--config", "config.yaml", "--config", "more.yaml")
    assert "epoch 1/1" in said


def test_the_home_stage_is_the_last_on_a_cpu_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["naive", "gemm", "fused"]
    monkeypatch.setattr("cnnlib.device.cuda.missing_parts", lambda: ["no driver"])
    assert training.home_stage(names) == "gemm"
    assert training.home_stage(["fused"]) == "fused"
    monkeypatch.setattr("cnnlib.device.cuda.missing_parts", lambda: [])
    assert training.home_stage(names) == "fused"


def test_train_says_when_it_diverges(home: Home) -> None:
    home.write(toy_config(training={"learning_rate": 1e30}))
    home(*TRAIN, "--epochs", "1", code=1)
    said = home(*TRAIN, "--checkpoint", "c.npz", code=1)
    assert re.fullmatch(r"diverged: the loss is (nan|inf) in epoch 1, .*learning_rate.*\n", said)
    assert home.names() == ["config.yaml", "toy.npz"]


def test_in_a_log_progress_is_plain_lines(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LINE_SECONDS", 0.0)
    home.capture.readouterr()
    assert main([*TRAIN, "--epochs", "1"]) == 0
    out, err = home.capture.readouterr()
    assert err.splitlines()[-1].startswith("epoch 1/1: 100 % of 11 steps, loss ")
    assert "\r" not in out + err
    assert "epoch 1/1: loss" in out


def test_on_a_terminal_progress_is_a_bar(home: Home, start: Start) -> None:
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    process = start(*TRAIN, "--epochs", "40", stderr=terminal)
    os.close(terminal)
    seen = b""
    try:
        while chunk := os.read(reader, 1000):
            seen += chunk
    except OSError:  # the other end of a terminal is closed
        pass
    os.close(reader)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(rb"\repoch \d+/40: .*\d+/11 .*loss=", seen)
    assert "epoch 40/40: loss" in out


def test_two_trainings_do_not_share_a_checkpoint(home: Home) -> None:
    with open(".lock-c.npz", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "c.npz is in use: another training is saved there" in home.fails(
            *TRAIN, "--checkpoint", "c.npz"
        )
        assert not Path("c.npz").exists()
    home(*TRAIN, "--epochs", "1", "--checkpoint", "c.npz")
    assert Path("c.npz").exists()
