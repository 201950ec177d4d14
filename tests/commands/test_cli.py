"""The command line: what commands do, what they say of bad input, and how they are interrupted."""

import contextlib
import ctypes
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cnnlib.measuring.cpu_profile
import cnnlib.measuring.feature_maps
import cnnlib.measuring.run
import cnnlib.training.target
from cnnlib import stages
from cnnlib.__main__ import main
from cnnlib.commands import training
from cnnlib.config import Config
from cnnlib.device import KernelError
from cnnlib.device.emulated import EmulatedDevice
from cnnlib.engine import Setup
from cnnlib.errors import ConfigError, DoesNotFit, Unsupported, WorkerDied
from cnnlib.measuring import schema
from cnnlib.measuring.freshness import damage
from cnnlib.measuring.runs import Run, settings_digest
from cnnlib.paths import ROOT
from cnnlib.stages import naive
from cnnlib.system.machine import usable_cores
from cnnlib.validation.parity import Unjudged
from tests.support.toys import small_disk, toy_config, toy_data, write_config

pytestmark = pytest.mark.quick

COMMANDS = (
    "download", "prepare", "train", "predict", "measure", "sweep", "transfers", "probe",
    "race", "cpu-profile", "features", "pictures", "check", "combine", "ladder", "stages", "plan",
)  # fmt: skip


class Home:
    """A folder with a config and data, and the command line called in it."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capture = capture
        self.config = toy_config()
        self.write(self.config)
        toy_data(folder)

    def write(self, config: Config) -> None:
        self.config = config
        write_config(self.folder / "config.yaml", config)

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run a command and expect exit code `code`; its output, or with another code stderr."""
        self.capture.readouterr()
        found = main(list(arguments))
        out, err = self.capture.readouterr()
        assert found == code, err
        return err if code else out

    def fails(self, *arguments: str) -> str:
        """Run a command that must be refused in one line."""
        said = self(*arguments, code=2)
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder))


@pytest.fixture
def home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Home]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    handler = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        yield Home(tmp_path, capsys)
    signal.signal(signal.SIGTERM, handler)


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(home: Home) -> Iterator[Start]:
    """Start a command in a process of its own (and a group, as a terminal has it)."""
    processes = []

    def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-m", "cnnlib", *arguments],
            cwd=home.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            text=True,
            start_new_session=True,
            # tests that run in a shell's background have it ignored, and would pass that on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


TRAIN = ("train", "--data", "toy.npz", "--out", "w.npz")
MEASURE = (
    "measure", "--dataset", "toy", "--network", "small", "--stage", "gemm", "--batch-size", "8",
    "--data", "toy.npz", "--out", "run",
)  # fmt: skip


def changed(arguments: tuple[str, ...], option: str, value: str) -> tuple[str, ...]:
    """The same with another value of one option, or with the option added."""
    if option not in arguments:
        return (*arguments, option, value)
    i = arguments.index(option)
    return (*arguments[: i + 1], value, *arguments[i + 2 :])


# help -------------------------------------------------------------------------------------------


def test_help_lists_all_commands(home: Home) -> None:
    said = home()
    assert said == home("--help")
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", said, re.M), command
        assert f"Usage: python -m cnnlib {command}" in home(command, "--help")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv[1:] = ['train', '--help']; import cnnlib.__main__ as m; m.main();"
        "heavy = {'numpy', 'pandas', 'yaml', 'PIL', 'tqdm'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--epoch", "3"], "No such option"),
        (["train", "--epochs", "three"], "'--epochs'.*integer"),
        (["train", "--epochs"], "requires an argument"),
        (["measure"], "Missing option"),
        (["predict"], "Missing argument"),
        (["stages", "extra"], "unexpected extra argument"),
        (["--verbose"], "No such option"),
    ],
)
def test_mistyped_commands(home: Home, arguments: list[str], problem: str) -> None:
    assert re.search(problem, home.fails(*arguments))


# the way of the data ----------------------------------------------------------------------------


def test_prepare_makes_what_measure_reads(home: Home) -> None:
    home("download", "--dataset", "toy", "--folder", "files")
    home("prepare", "--dataset", "toy", "--folder", "files", "--out", "again/toy.npz")
    assert (home.folder / "again/toy.npz").read_bytes() == (home.folder / "toy.npz").read_bytes()
    said = home(*changed(MEASURE, "--data", "again/toy.npz"))
    assert re.fullmatch(
        r"gemm, batch 8: ok, \S+ s an epoch, test accuracy \d+\.\d\d %, on .*\n", said
    )
    assert sorted(os.listdir("run")) == sorted([*KINDS, "run.json"])


KINDS = [f"{table}.csv" for table in sorted(schema.RUN_TABLES)]


def test_combine(home: Home) -> None:
    for repeat in ("1", "2"):
        home(*changed(changed(MEASURE, "--repeat", repeat), "--out", f"r{repeat}"))
    said = home("combine", "--table", "steps", "--out", "t/all.csv", "r1/steps.csv", "r2/steps.csv")
    assert said == "t/all.csv: 6 rows of 2 files\n"
    whole = (home.folder / "t/all.csv").read_text().splitlines()
    parts = [(home.folder / f"r{r}/steps.csv").read_text().splitlines() for r in (1, 2)]
    assert whole == parts[0] + parts[1][1:]
    (home.folder / "list").write_text("r1/steps.csv\n\nr2/steps.csv\n")
    home("combine", "--table", "steps", "--out", "listed.csv", "--list", "list")
    assert (home.folder / "listed.csv").read_text().splitlines() == whole
    (home.folder / "list").write_text("")
    home("combine", "--table", "steps", "--out", "none.csv", "--list", "list")
    assert (home.folder / "none.csv").read_text().splitlines() == whole[:1]


def test_combine_refuses(home: Home) -> None:
    home(*MEASURE)
    combine = ("combine", "--table", "epochs", "--out", "all.csv")
    assert "unknown table 'epoch' in --table; known: epochs" in home.fails(
        *changed(combine, "--table", "epoch"), "run/epochs.csv"
    )
    assert "no epochs files" in home.fails(*combine)
    assert "not a epochs table" in home.fails(*combine, "run/steps.csv")
    assert "cannot read nothing.csv" in home.fails(*combine, "run/epochs.csv", "nothing.csv")
    assert "both hold the run" in home.fails(*combine, "run/epochs.csv", "run/epochs.csv")
    assert "cannot read nolist" in home.fails(*combine, "--list", "nolist")
    (home.folder / "binary").write_bytes(b"\xff\xfe")
    assert "binary is not a list" in home.fails(*combine, "--list", "binary")
    (home.folder / "cut.csv").write_bytes((home.folder / "run/epochs.csv").read_bytes()[:-9])
    assert "cut.csv" in home.fails(*combine, "cut.csv")
    assert not (home.folder / "all.csv").exists()


def test_pictures(home: Home) -> None:
    assert "results/data/toy.npz" in home.fails("pictures", "--out", "p.csv")
    (home.folder / "results/data").mkdir(parents=True)
    shutil.copy("toy.npz", "results/data/toy.npz")
    assert home("pictures", "--out", "p.csv") == "p.csv: 3 images\n"
    found = schema.read("p.csv", "pictures")
    assert set(found["dataset"]) == {"toy"}
    assert list(found["label"]) == [0, 1, 2]  # one of each class, and no hard ones


def test_ladder(home: Home) -> None:
    assert "no results/tables/ladder.md yet: `make run` makes it" in home.fails("ladder")
    (home.folder / "here/tables").mkdir(parents=True)
    (home.folder / "here/tables/ladder.md").write_text("| stage |\n|---|\n| naïve × 3 |\n")
    assert home("ladder", "--results", "here") == "| stage |\n|---|\n| naïve × 3 |\n"


def test_stages_and_plan(home: Home) -> None:
    said = home("stages")
    for stage in stages.LADDER:
        assert re.search(rf"^{stage.name}  .*{re.escape(stage.change)}$", said, re.M)
    said = home("plan")
    assert re.search(r"^conv1 +2x6x6 +20 +1,296$", said, re.M)
    assert said.count("\nstage ") == len(stages.LADDER)
    said = home("plan", "--stage", "naive", "--network", "small", "--dataset", "toy")
    assert said.count("\nstage ") == 1
    assert re.search(r"^  Loops +dense1$", said, re.M)
    plan = home("plan", "--stage", "tuned")
    assert re.search(r"^  TunedFirst +conv1\+activation1\+subsample1$", plan, re.M)
    assert "unknown stage 'x' in --stage" in home.fails("plan", "--stage", "x")
    assert "unknown network 'x' in --network" in home.fails("plan", "--network", "x")


class NoKernels(EmulatedDevice):
    """Engines are made on it without compiling anything."""

    def compile(self, *source: Any) -> Any:
        return None


@pytest.mark.parametrize("device", ["emulated", "cuda"])
def test_plan_says_what_run_json_would_say(
    home: Home, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """For every stage; where there is no GPU, no compiler and no kernel is needed."""
    convolution = {"conv": {"maps": 64, "kernel": 3}}
    fits = [{"conv": {"maps": 2, "kernel": 3}}, {"activation": "relu"}, {"subsample": 2}]
    networks: dict[str, Any] = {
        "fits": [*fits, {"dense": 3}],
        "wide": [convolution, {"activation": "relu"}, convolution, {"dense": 3}],
        "strided": [{"conv": {"maps": 2, "kernel": 3, "stride": 2}}, {"dense": 3}],
    }
    names = [stage.name for stage in (*stages.LADDER, *stages.VARIANTS)]
    sweep = {"networks": list(networks), "stages": names, "device": device}
    home.write(toy_config(networks=networks, sweep=sweep))
    given = [option for name in names for option in ("--stage", name)]
    with monkeypatch.context() as without:
        without.setenv("CXX", "/nowhere/g++")
        without.setattr("cnnlib.device.cuda.missing_parts", lambda: ["no driver"])
        printed = {name: home("plan", "--network", name, *given) for name in networks}
    said = {
        name: {
            block.split(maxsplit=1)[0].rstrip(","): block.splitlines()[1:]
            for block in text.split("\nstage ")[1:]
        }
        for name, text in printed.items()
    }
    assert said["wide"]["tuned"][0].startswith(
        "  unavailable: stage 'tuned' cannot take conv2 of network 'wide': the gradient of its "
        "36,928 weights is summed"
    )
    assert printed["fits"].count("its sizes are not checked") == (5 if device == "cuda" else 0)
    with NoKernels() as emulated:
        for name in networks:
            network = home.config.network(name, "toy", "here")
            for stage in (*stages.LADDER, *stages.VARIANTS):
                if (name, stage.name) == ("wide", "tuned"):
                    continue
                place = emulated if stage.runs_on == "cuda" else None
                with stage.engine(stage, Setup(network, 8, 0.1), place) as engine:
                    pairs = [line.split()[::-1] for line in said[name][stage.name] if line]
                    assert engine.served == [": ".join(pair) for pair in pairs], stage.name


@pytest.mark.slow
def test_check(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.write(toy_config(sweep={"stages": ["naive", "gemm"], "batch_sizes": [1, 7]}))
    lines = [line.split() for line in home("check").splitlines()[1:]]
    assert [(line[0], line[3], line[5]) for line in lines] == [
        (stage, batch, "ok") for stage in ("naive", "gemm") for batch in ("1", "7")
    ]
    assert all(0 <= float(line[4]) <= 1 for line in lines)

    def slightly_wrong(self: Any, images: Any, labels: Any) -> Any:
        loss, gradient = original(self, images, labels)
        return loss, gradient * 1.001 if len(images) == 7 else gradient

    original = stages.gemm.STAGE.engine.gradient
    wrong = type("Wrong", (stages.gemm.STAGE.engine,), {"gradient": slightly_wrong})
    import dataclasses

    bad = dataclasses.replace(stages.gemm.STAGE, engine=wrong)
    monkeypatch.setattr(stages, "LADDER", (naive.STAGE, bad))
    capture = home.capture
    capture.readouterr()
    assert main(["check"]) == 1
    out, err = capture.readouterr()
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["ok", "ok", "ok", "FAILED"]
    assert "stage 'gemm' fails validation" in err

    def no_way_to_say(self: Any, images: Any, labels: Any) -> Any:
        raise Unjudged("network 'small' cannot be judged: for a reason")

    unjudged = type("Unjudged", (stages.gemm.STAGE.engine,), {"gradient": no_way_to_say})
    bad = dataclasses.replace(stages.gemm.STAGE, engine=unjudged)
    monkeypatch.setattr(stages, "LADDER", (naive.STAGE, bad))
    assert main(["check"]) == 1
    out, err = capture.readouterr()
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["ok", "ok"] + 2 * ["unjudged"]
    assert err == "network 'small' cannot be judged: for a reason\n"


# train and predict ------------------------------------------------------------------------------


def weights(path: Path | str) -> np.ndarray:
    with np.load(path) as saved:
        return saved["parameters"]


def test_train_tells_and_writes(home: Home) -> None:
    said = home(*TRAIN, "--epochs", "3")
    assert [line.split(":")[0] for line in said.splitlines()[1:]] == [
        "epoch 1/3", "epoch 2/3", "epoch 3/3", "weights",
    ]  # fmt: skip
    assert "by stage gemm, batch 8" in said
    assert re.search(r"test accuracy \d+\.\d\d %", said)
    assert home.names() == ["config.yaml", "toy.npz", "w.npz"]


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
    """Data and weights lie where the workflow has them; what is missing is made."""
    said = home("train")
    assert home.names() == ["config.yaml", "results", "toy.npz"]
    assert (home.folder / "results/data/toy.npz").exists()
    assert said.endswith("weights: results/weights.npz\n")
    made = (home.folder / "results/data/toy.npz").stat().st_mtime_ns
    home("train", "--epochs", "1")
    assert (home.folder / "results/data/toy.npz").stat().st_mtime_ns == made


@pytest.mark.parametrize("change", ["seed", "shape of labels", "damage", "older version"])
def test_train_makes_data_anew_that_are_not_the_configs(home: Home, change: str) -> None:
    """Not a word was said, and the training was on the old data."""
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
    told = capture.readouterr().err
    assert told.count("\n") == 1
    assert str(Path("results/data/toy.npz")) in told
    assert told.endswith("; it is made again\n")
    same = change in ("damage", "older version")
    assert (made.read_bytes() == before) == same
    assert np.array_equal(weights("results/weights.npz"), trained) == same
    if not same:
        fresh = weights("results/weights.npz")
        shutil.rmtree("results")
        home("train")
        assert np.array_equal(weights("results/weights.npz"), fresh)


NEW = {"specification", "digest"}


def test_train_makes_data_anew_of_other_files(home: Home) -> None:
    """Another folder whose files have other checksums, and other mirrors of the same files."""
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


STALE = {
    "train": TRAIN,
    "measure": MEASURE,
    "cpu-profile": ("cpu-profile", *MEASURE[1:-2], "--out", "f.csv"),
    "pictures": ("pictures", "--out", "p.csv"),
    "features": ("features", "--out", "p.csv"),
    "sweep": ("sweep",),
}  # fmt: skip


@pytest.mark.parametrize("command", STALE)
def test_data_of_another_specification_are_refused(home: Home, command: str) -> None:
    """One line names the file, what differs and how to make it, which then helps."""
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
def test_what_cannot_be_written_is_said_before_the_work(
    home: Home, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], blocked: str
) -> None:
    (home.folder / "results/data").mkdir(parents=True)
    shutil.copy("toy.npz", "results/data/toy.npz")

    def work(*given: Any, **options: Any) -> Any:
        raise AssertionError("it has begun")

    # Imported before one of them is changed: they hand the function to each other.
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


def test_predict(home: Home) -> None:
    home(*TRAIN, "--epochs", "1")
    ink = np.zeros((40, 30), np.uint8)
    ink[5:35, 10:14] = 255
    for name, picture in (("dark", ink), ("light", 255 - ink)):
        Image.fromarray(picture).save(f"{name}.png")
    said = home("predict", "--weights", "w.npz", "dark.png", "light.png")
    first, second = said.split("light.png")
    assert first.removeprefix("dark.png") == second
    digit, *shares = second.splitlines()
    numbers = [float(line.split()[1]) for line in shares]
    said_digit, doubt = re.fullmatch(
        r": (\d)( \(doubtful: \d+\.\d %; or \d: \d+\.\d %\))?", digit
    ).groups()
    assert int(said_digit) == np.argmax(numbers)
    assert (doubt is not None) == (max(numbers) < 90)
    assert sum(numbers) == pytest.approx(100, abs=0.05)
    assert len(numbers) == 3
    for line, number in zip(shares, numbers, strict=True):
        assert line.count("#") == pytest.approx(0.4 * number, abs=0.51)


def strokes(home: Home) -> None:
    """Two pictures with a stroke each, and two others that cannot be read."""
    ink = np.zeros((40, 30), np.uint8)
    ink[5:35, 10:14] = 255
    Image.fromarray(ink).save("one.png")
    Image.fromarray(255 - ink.T).save("two.webp", lossless=True)
    Image.new("L", (28, 28), 255).save("empty.png")
    (home.folder / "text.gif").write_text("hello")


def test_each_of_several_pictures_gets_its_answer_or_its_error(home: Home) -> None:
    home(*TRAIN, "--epochs", "1")
    strokes(home)
    os.rename("text.gif", "two\nlines.gif")
    names = ["two\nlines.gif", "one.png", "nothing.png", "empty.png", "two.webp"]
    home.capture.readouterr()
    assert main(["predict", "--weights", "w.npz", *names]) == 2
    out, err = home.capture.readouterr()
    answers = [line.split(":")[0] for line in out.splitlines() if not line.startswith(" ")]
    assert answers == ["one.png", "two.webp"]
    errors = err.splitlines()
    assert len(errors) == 3
    for line, name in zip(errors, (r"two\nlines.gif", "nothing.png", "empty.png"), strict=True):
        assert line.startswith("error: ")
        assert name in line


def test_predict_as_json(home: Home) -> None:
    home(*TRAIN, "--epochs", "1")
    strokes(home)
    shown = json.loads(home("predict", "--weights", "w.npz", "--json", "one.png"))
    assert (
        main(["predict", "--json", "--weights", "w.npz", "one.png", "empty.png", "two.webp"]) == 2
    )
    first, second, third = json.loads(home.capture.readouterr().out)
    assert [first] == shown
    assert second == {
        "picture": "empty.png",
        "error": "empty.png is empty: nothing on it stands out from the background",
    }
    for name, found in (("one.png", first), ("two.webp", third)):
        shares = found["probabilities"]
        assert found["picture"] == name
        assert sum(shares) == pytest.approx(1)
        assert found["class"] == np.argmax(shares)
        assert found["probability"] == max(shares)
        assert shares[found["runner_up"]] == sorted(shares)[-2]
        assert found["doubtful"] == (max(shares) < 0.9)


def test_doubt_is_shown() -> None:
    doubtful = training.answer([0.02, 0.61, 0.37])
    assert training.in_words(doubtful | {"picture": "a.png"}).splitlines()[0] == (
        "a.png: 1 (doubtful: 61.0 %; or 2: 37.0 %)"
    )
    certain = training.answer([0.02, 0.06, 0.92])
    assert training.in_words(certain | {"picture": "a.png"}).splitlines()[0] == "a.png: 2"
    assert not training.answer([1.0])["doubtful"]
    assert training.answer([float("nan")] * 2)["doubtful"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_weights_that_are_a_picture(home: Home, kind: str) -> None:
    strokes(home)
    Image.open("one.png").save("picture", kind)
    said = home.fails("predict", "--weights", "picture", "one.png")
    assert f"--weights picture is a {kind} picture" in said


def test_predict_refuses(home: Home) -> None:
    home(*TRAIN, "--epochs", "1")
    Image.new("L", (28, 28), 255).save("empty.png")
    (home.folder / "text.png").write_text("hello")
    for name, problem in (
        ("nothing.png", "cannot read nothing.png: No such file"),
        ("empty.png", "empty.png is empty"),
        ("text.png", "text.png is not a PNG or JPEG"),
        ("toy.npz", "toy.npz is not a PNG or JPEG"),
    ):
        assert problem in home.fails("predict", "--weights", "w.npz", name)
    whole = (home.folder / "w.npz").read_bytes()
    ink = np.zeros((28, 28), np.uint8)
    ink[5:20, 14] = 255
    Image.fromarray(ink).save("one.png")
    for content in (b"", b"hello", whole[:200], whole[:-40]):
        (home.folder / "bad.npz").write_bytes(content)
        assert "weights file bad.npz is damaged" in home.fails(
            "predict", "--weights", "bad.npz", "one.png"
        )
    assert "toy.npz is no weights file: it lacks" in home.fails(
        "predict", "--weights", "toy.npz", "one.png"
    )
    assert "cannot read weights file results/weights.npz" in home.fails("predict", "one.png")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("kind", "something else", "is no weights file of this version"),
        ("layers", "[{", "is damaged"),
        ("layers", "[" * 100_000, "is damaged"),
        ("layers", '[{"conv": 3}]', "is damaged.*kernel"),
        ("layers", '[{"dense": 4}]', "is damaged.*3 classes"),
        ("layers", 3, "is damaged"),
        ("input_shape", [8, 8], "is damaged"),
        ("input_shape", [-1, 8, 8], "is damaged"),
        ("input_shape", [1, 2, 2], "is damaged.*larger than the 2x2 map"),
        ("classes", [3, 3], "is damaged"),
        ("parameters", np.zeros(3, np.float32), "do not fit"),
        ("parameters", np.zeros(77), "do not fit"),
        ("parameters", np.full(77, np.nan, np.float32), "not finite"),
        ("mean", np.nan, "do not fit"),
        ("deviation", 0.0, "do not fit"),
        ("deviation", "x", "is damaged"),
        ("origin", "{", "is damaged"),
    ],
)
def test_weights_that_contradict_themselves(
    home: Home, name: str, value: Any, problem: str
) -> None:
    home(*TRAIN, "--epochs", "1")
    Image.fromarray(np.eye(28, dtype=np.uint8) * 255).save("one.png")
    with np.load("w.npz") as saved:
        arrays = dict(saved)
    np.savez("bad.npz", **(arrays | {name: value}))
    assert re.search(problem, home.fails("predict", "--weights", "bad.npz", "one.png"))


def test_train_says_when_it_diverges(home: Home) -> None:
    home.write(toy_config(training={"learning_rate": 1e30}))
    home(*TRAIN, "--epochs", "1", code=1)
    said = home(*TRAIN, "--checkpoint", "c.npz", code=1)
    assert re.fullmatch(r"diverged: the loss is (nan|inf) in epoch 1, .*learning_rate.*\n", said)
    assert home.names() == ["config.yaml", "toy.npz"]


def test_measure_says_when_it_diverges(home: Home) -> None:
    home.write(toy_config(training={"learning_rate": 1e30}))
    assert home(*MEASURE).startswith("gemm, batch 8: diverged, on ")
    assert list(schema.read("run/epochs.csv", "epochs").status) == ["diverged"]


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


# bad input --------------------------------------------------------------------------------------


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
    assert re.match(r"gemm, batch 8: does_not_fit: \d+ bytes .*, on ", said), said


def test_two_trainings_do_not_share_a_checkpoint(home: Home) -> None:
    with open(".lock-c.npz", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "c.npz is in use: another training is saved there" in home.fails(
            *TRAIN, "--checkpoint", "c.npz"
        )
        assert not Path("c.npz").exists()
    home(*TRAIN, "--epochs", "1", "--checkpoint", "c.npz")
    assert Path("c.npz").exists()


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


# interruptions ----------------------------------------------------------------------------------


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended before it said {text!r}: {process.communicate()}")


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends, "it never came true"
        time.sleep(0.02)


EPOCHS = "60"


@pytest.mark.slow
def test_a_training_survives_whatever_interrupts_it(home: Home, start: Start) -> None:
    """Ctrl-C, SIGTERM, SIGUSR1 and kill -9, then gone on: as undisturbed, to the bit."""
    told = "stopped by {}: the training is saved in c.npz; the same command resumes it\n"
    arguments = (*TRAIN, "--epochs", EPOCHS, "--batch-size", "32")
    home(*arguments)
    expected = (home.folder / "w.npz").read_bytes()
    (home.folder / "w.npz").unlink()
    arguments = (*arguments, "--checkpoint", "c.npz")
    for epoch, number, code, said in (
        (10, signal.SIGINT, 130, "interrupted\n"),
        (20, signal.SIGTERM, 143, told.format("SIGTERM")),
        (25, signal.SIGUSR1, 138, told.format("SIGUSR1")),
        (30, signal.SIGKILL, -9, ""),
        (40, signal.SIGKILL, -9, ""),
    ):
        process = start(*arguments)
        read_until(process, f"epoch {epoch}/{EPOCHS}")
        workers = children(process.pid)
        assert workers or usable_cores() == 1
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=30)
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
    assert int(first[1]) >= 40  # told before it is saved
    assert (home.folder / "w.npz").read_bytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_measurement_stopped_half_way_is_none(
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
    _, err = process.communicate(timeout=30)
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
    """--mark is for what stages do, not for what a person or a scheduler does."""
    home.write(toy_config(measuring={"warmup_seconds": 600.0}))
    process = start(*MEASURE, "--mark")
    wait_for(lambda: process.poll() is not None or bool(children(process.pid)))
    time.sleep(0.5)
    (child,) = children(process.pid)
    os.kill(child if alone else process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert err == ("interrupted\n" if number == signal.SIGINT else "")
    assert not alive(child)
    assert home.names() == ["config.yaml", "toy.npz"]


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True], ids=["the command", "its process alone"])
def test_a_full_measurement_that_is_stopped_resumes(home: Home, start: Start, alone: bool) -> None:
    measuring = {"full": True, "budget_seconds": 1e-6}
    home.write(toy_config(measuring=measuring, training={"epochs": 12}))
    command = (*changed(MEASURE, "--stage", "naive"), "--mark", "--repeat", "2")  # without a curve
    process = start(*command)
    wait_for(lambda: process.poll() is not None or bool(children(process.pid)))
    time.sleep(0.5)
    (child,) = children(process.pid)
    os.kill(child if alone else process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert err == (
        "stopped by SIGTERM: the training is saved in results/checkpoints; the same command "
        "resumes it\n"
    )
    assert process.returncode == 143
    assert not (home.folder / "run").exists()
    assert list((home.folder / "results/checkpoints").rglob("*.npz"))
    home(*command)
    facts = json.loads((home.folder / "run/run.json").read_text())
    assert "failed" not in facts, facts["failed"]
    assert facts["resumed"]
    assert not list((home.folder / "results/checkpoints").rglob("*.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["crashes", "leaves", "hangs"])
def test_a_stage_that_ends_its_process(
    home: Home, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Without --mark it is an error, with it a row; what was there before is replaced."""
    import dataclasses

    def train(self: Any, *arguments: Any) -> float:
        if how == "leaves":
            os._exit(0)
        if how == "hangs":
            time.sleep(60)
        return float(ctypes.string_at(0))

    engine = type("Engine", (naive.STAGE.engine,), {"train": train})
    bad = dataclasses.replace(naive.STAGE, name="bad", engine=engine)
    home.write(toy_config(measuring={"limit_seconds": 2.0} if how == "hangs" else {}))
    home(*MEASURE)
    before = (home.folder / "run/run.json").read_bytes()
    monkeypatch.setattr(stages, "LADDER", (bad,))
    command = changed(MEASURE, "--stage", "bad")
    why = {
        "crashes": "killed by SIGSEGV while validating, in ",
        "leaves": "ended its process with exit code 0 while validating",
        "hangs": "stage 'bad' hangs while validating, "
        "in check_steps of cnnlib/validation/steps.py:",
    }[how]
    said = home(*command, code=1).splitlines()[-1]
    assert said.startswith(f"error: {why}")
    assert (home.folder / "run/run.json").read_bytes() == before
    assert home(*command, "--mark").startswith(f"bad, batch 8: failed: {why}")
    facts = json.loads((home.folder / "run/run.json").read_text())
    assert facts["failed"].startswith(why)
    if how == "hangs":
        assert facts["failed"].endswith("run took longer than measuring.limit_seconds, 2 s")
    (row,) = schema.read(home.folder / "run/epochs.csv", "epochs").itertuples()
    assert (row.stage, row.status, row.validated) == ("bad", "failed", False)
    assert (row.device, row.device_kind) == (facts["device"], "cpu")
    assert facts["device"]
    asked = Run("toy", "small", "bad", 8, 1)
    assert facts["settings"] == settings_digest(home.config, asked, bad.runs_on)
    assert damage(home.folder / "run") == ""
    assert home.names() == ["config.yaml", "run", "toy.npz"]
    assert {path.name for path in (home.folder / "run").iterdir()} == {
        "run.json", *(f"{name}.csv" for name in schema.RUN_TABLES)
    }  # fmt: skip
    profile = ("cpu-profile", *command[1:-1], "f.csv")
    home(*profile)
    (row,) = schema.read(home.folder / "f.csv", "cpu_profile").itertuples()
    assert (row.stage, row.status, row.calls) == ("bad", "failed", 0)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unsupported("weights of another size"), "unavailable"),
        (DoesNotFit("too many images"), "does_not_fit"),
        (MemoryError("too many images"), "does_not_fit"),
        (WorkerDied("a process of it ended"), "failed"),
        (KernelError("the GPU is lost"), "failed"),
        (FileNotFoundError("wheels.bin"), "failed"),
        (ConfigError("no such thing"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_cannot_be_examined_is_a_row(
    home: Home, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str | None
) -> None:
    """Except where the user has asked for something wrong."""
    import dataclasses

    def load(self: Any, *arguments: Any) -> None:
        raise error

    engine = type("Engine", (naive.STAGE.engine,), {"load": load})
    monkeypatch.setattr(stages, "LADDER", (dataclasses.replace(naive.STAGE, engine=engine),))
    command = ("cpu-profile", *changed(MEASURE, "--stage", "naive")[1:-1], "f.csv")
    if status is None:
        assert str(error) in home.fails(*command)
        assert not (home.folder / "f.csv").exists()
        return
    home(*command)
    (row,) = schema.read(home.folder / "f.csv", "cpu_profile").itertuples()
    assert (row.stage, row.status) == ("naive", status)


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
        timeout=60,
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_leaves_no_process(
    home: Home, start: Start, number: signal.Signals
) -> None:
    home.write(toy_config(measuring={"warmup_seconds": 600.0}))
    (home.folder / "results/data").mkdir(parents=True)
    (home.folder / "toy.npz").rename(home.folder / "results/data/toy.npz")
    process = start("sweep")
    wait_for(lambda: process.poll() is not None or bool(children(process.pid)))
    time.sleep(0.5)
    assert process.poll() is None
    (child,) = children(process.pid)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert err == ("interrupted\n" if number == signal.SIGINT else "")
    assert not alive(child)
    assert os.listdir("results") == ["data"]


def test_a_reader_that_leaves_is_no_error(home: Home, start: Start) -> None:
    """As in `python -m cnnlib plan | head -1`."""
    process = start("plan")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(30) in (0, 1)
