"""Bad input is refused in one line, before any work."""

import os
import re
import shutil
from typing import Any

import pytest

import cnnlib.measuring.cpu_profile
import cnnlib.measuring.feature_maps
import cnnlib.measuring.run
import cnnlib.training.target
from tests.support.command_line import MEASURE, TRAIN, Home, changed
from tests.support.toys import small_disk, toy_config

pytestmark = pytest.mark.quick


STALE = {
    "train": TRAIN,
    "measure": MEASURE,
    "cpu-profile": ("cpu-profile", *MEASURE[1:-2], "--out", "f.csv"),
    "pictures": ("pictures", "--out", "p.csv"),
    "features": ("features", "--out", "p.csv"),
    "sweep": ("sweep",),
}


@pytest.mark.parametrize("command", STALE)
def test_data_of_another_specification_are_refused(home: Home, command: str) -> None:
    """One line names the file, the difference and the command that makes it, which then works."""
    (home.folder / "results/data").mkdir(parents=True)
    shutil.copy("toy.npz", "results/data/toy.npz")
    spec = home.config.datasets["toy"]
    home.write(toy_config(datasets={"toy": spec.model_dump() | {"seed": 7}}))
    said = home.fails(*STALE[command])
    path = "toy.npz" if "--data" in STALE[command] else "results/data/toy.npz"
    assert said.startswith(
        f"error: {path} was made by another specification than datasets.toy: seed is 1 in it, 7 "
        "in the config; prepare it again, with the same config, by `python -m cnnlib prepare "
    )
    remedy = re.findall(r"`python -m cnnlib (.*?)`", said)
    for each in remedy:
        home(*each.split())
    home(*STALE[command])


@pytest.mark.parametrize(
    ("arguments", "blocked"),
    [
        (TRAIN, "w.npz"),
        (("train", "--data", "toy.npz"), "results/weights.npz"),
        ((*TRAIN, "--checkpoint", "c.npz"), "c.npz"),
        (MEASURE, "run/samples.csv"),
        (MEASURE, "run/run.json"),
        (STALE["cpu-profile"], "f.csv"),
        (("probe", "--out", "p.csv"), "p.csv"),
        (("features", "--out", "p.csv"), "p.csv"),
        (("sweep",), "results/runs/toy/small/gemm/b8/r1/kernels.csv"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    home: Home, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], blocked: str
) -> None:
    (home.folder / "results/data").mkdir(parents=True)
    shutil.copy("toy.npz", "results/data/toy.npz")

    def work(*given: Any, **options: Any) -> Any:
        raise AssertionError("it has begun")

    # All are imported before one of them is changed, since they import each other's function.
    for module in (
        cnnlib.training.target,
        cnnlib.measuring.run,
        cnnlib.measuring.cpu_profile,
        cnnlib.measuring.feature_maps,
    ):
        monkeypatch.setattr(module, "open_engine", work)
    monkeypatch.setattr("cnnlib.probes.measure_limits", work)
    (home.folder / blocked).mkdir(parents=True)
    before = sorted(home.folder.rglob("*"))
    assert home.fails(*arguments) == f"error: cannot write {blocked}: Is a directory\n"
    assert sorted(home.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (changed(TRAIN, "--dataset", "toi"), "unknown data set 'toi' in --dataset; known: toy"),
        (changed(TRAIN, "--network", "big"), "unknown network 'big' in --network; known: small"),
        (changed(TRAIN, "--stage", "gem"), "unknown stage 'gem' in --stage; known: naive, gemm"),
        (changed(TRAIN, "--batch-size", "0"), "--batch-size must be at least 1, not 0"),
        (changed(TRAIN, "--batch-size", "-8"), "--batch-size must be at least 1, not -8"),
        (changed(TRAIN, "--batch-size", "91"), "batch size 91 is larger than data set 'toy'"),
        (changed(TRAIN, "--epochs", "0"), r"training\.epochs: .*greater than 0, not 0"),
        (changed(TRAIN, "--seed", "-1"), r"training\.seed: "),
        (changed(TRAIN, "--data", "no.npz"), r"no\.npz.*No such file"),
        (changed(TRAIN, "--data", "config.yaml"), r"config\.yaml"),
        (changed(TRAIN, "--config", "no.yaml"), r"cannot read no\.yaml: No such file"),
        (changed(TRAIN, "--config", "toy.npz"), r"toy\.npz is not YAML"),
        (changed(TRAIN, "--out", "config.yaml/w.npz"), r"cannot write config\.yaml/w\.npz"),
        (changed(TRAIN, "--out", "/proc/none/w.npz"), r"cannot write /proc/none/w\.npz"),
        (changed(TRAIN, "--checkpoint", "config.yaml"), r"checkpoint config\.yaml is damaged"),
        (changed(TRAIN, "--checkpoint", "toy.npz"), r"toy\.npz is no checkpoint: it lacks"),
        (changed(TRAIN, "--checkpoint", "/proc/none/c"), r"cannot write /proc/none/c"),
        (changed(MEASURE, "--dataset", "toi"), "unknown data set 'toi' in --"),
        (changed(MEASURE, "--network", "big"), "unknown network 'big' in --network"),
        (changed(MEASURE, "--stage", "gem"), "unknown stage 'gem' in --stage"),
        (changed(MEASURE, "--batch-size", "0"), "--batch-size must be at least 1, not 0"),
        (changed(MEASURE, "--batch-size", "91"), "batch size 91 is larger than data set 'toy'"),
        (changed(MEASURE, "--repeat", "0"), "--repeat must be at least 1, not 0"),
        (changed(MEASURE, "--repeat", "-1"), "--repeat must be at least 1, not -1"),
        (changed(MEASURE, "--data", "no.npz"), r"no\.npz.*No such file"),
        (changed(MEASURE, "--out", "config.yaml"), r"config\.yaml"),
        (changed(MEASURE, "--out", "/proc/none"), r"/proc/none"),
        (("transfers", *MEASURE[1:]), "stage 'gemm' loads nothing onto a GPU"),
        (("transfers", *changed(MEASURE, "--batch-size", "0")[1:]), "--batch-size must be at"),
        (
            ("transfers", *changed(MEASURE, "--dataset", "toi")[1:]),
            "unknown data set 'toi' in --da",
        ),
        (("download", "--dataset", "x", "--folder", "d"), "unknown data set 'x' in --dataset"),
        (("prepare", "--dataset", "x", "--folder", "d", "--out", "o"), "unknown data set 'x'"),
        (
            ("prepare", "--dataset", "toy", "--folder", "d", "--out", "/proc/none/o.npz"),
            "cannot write /proc/none/o.npz",
        ),
        (("check", "--config", "no.yaml"), r"cannot read no\.yaml"),
        (("plan", "--config", "no.yaml"), r"cannot read no\.yaml"),
    ],
)
def test_bad_input(home: Home, arguments: tuple[str, ...], problem: str) -> None:
    before = home.names()
    assert re.search(problem, home.fails(*arguments))
    assert home.names() == before


def test_data_that_are_damaged_or_of_another_set(home: Home) -> None:
    whole = (home.folder / "toy.npz").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:-30]):
        (home.folder / "bad.npz").write_bytes(content)
        assert "bad.npz" in home.fails(*changed(TRAIN, "--data", "bad.npz"))
        assert "bad.npz" in home.fails(*changed(MEASURE, "--data", "bad.npz"))
    smaller = toy_config(
        datasets={"toy": home.config.datasets["toy"].model_dump() | {"train_images": 50}}
    )
    home.write(smaller)
    assert re.search(r"toy\.npz .*90 train images.*50", home.fails(*TRAIN))


def test_a_network_beyond_any_memory(home: Home) -> None:
    layers = [{"dense": 2**31 - 1}, {"dense": 2**31 - 1}, {"dense": 3}]
    home.write(toy_config(networks={"small": layers}))
    assert "memory" in home.fails(*TRAIN)
    said = home(*MEASURE)
    assert re.match(r"gemm, batch 8: does_not_fit: cannot allocate \d+ bytes .*, on ", said), said


def test_a_full_disk(home: Home) -> None:
    with small_disk(home.folder / "disk") as disk:
        (disk / "filler").write_bytes(b"x")
        with open(disk / "filler", "wb", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                pass
        full = "No space left on device"
        assert full in home.fails(*changed(TRAIN, "--out", "disk/w.npz"))
        assert full in home.fails(*changed(TRAIN, "--checkpoint", "disk/c.npz"))
        assert full in home.fails(*changed(MEASURE, "--out", "disk"))
        assert full in home.fails(
            "prepare", "--dataset", "toy", "--folder", ".", "--out", "disk/toy.npz"
        )
        assert os.listdir(disk) == ["filler"]
