"""Stages outside the repository in every command that takes one."""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from cnnlib.__main__ import main
from cnnlib.measuring import schema
from cnnlib.measuring.cards import card_of
from cnnlib.measuring.long_runs import checkpoint_file
from cnnlib.measuring.runs import Run
from cnnlib.paths import ROOT
from tests.support.command_line import Home
from tests.support.own_stages import HEAD, SOUND, Write, forgetful, writer
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick

RUN = ("--dataset", "toy", "--network", "small", "--batch-size", "8", "--data", "toy.npz")
OTHER = SOUND.replace("mine", "other").replace("My own", "Another")


@pytest.fixture
def mine(home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    forgetful(monkeypatch)
    return home


@pytest.fixture
def write(mine: Home) -> Write:
    return next(writer(mine.folder))


def listing(mine: Home, *stages: str, **sections: dict[str, object]) -> None:
    """Let the config's sweep have these stages, files among them."""
    settings = toy_config(**sections).model_dump(mode="json")
    settings["sweep"]["stages"] = list(stages)
    (mine.folder / "config.yaml").write_text(yaml.safe_dump(settings))


def facts(folder: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(Path(folder, "run.json").read_text())
    return found


def examples(language: str) -> list[str]:
    text = (ROOT / "docs/extending/own-stage.md").read_text(encoding="utf-8")
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


@pytest.mark.parametrize("number", [0, 1], ids=["kernels", "loop"])
def test_the_examples_of_the_documentation(mine: Home, write: Write, number: int) -> None:
    code = examples("python")[number]
    name = re.findall(r'name="(\w+)"', code)[0]
    path = write(code, f"{name}.py")
    write(*examples("cuda"), "relu.cuh")
    settings = toy_config(sweep={"device": "emulated"}).model_dump(mode="json")
    before = [] if number else [{"activation": "relu"}, {"conv": {"maps": 2, "kernel": 3}}]
    settings["networks"] = {"small": [*before, {"dense": 3}]}
    (mine.folder / "config.yaml").write_text(yaml.safe_dump(settings))
    said = mine("check", "--stage", path)
    assert said.splitlines()[1].split()[::5] == [name, "ok"]
    assert ("dense  dense1" if number else "Relu") in mine("plan", "--stage", path)


def test_measure(mine: Home, write: Write) -> None:
    said = mine("measure", "--stage", write(SOUND), *RUN, "--out", "out")
    assert said.startswith("mine, batch 8: ok")
    assert facts("out")["stage_file"] == str(mine.folder / "mine.py")
    assert len(str(facts("out")["stage_digest"])) == 64
    assert set(schema.read(Path("out/epochs.csv"), "epochs")["stage"]) == {"mine"}
    mine("measure", "--stage", "gemm", *RUN, "--out", "shipped")
    assert not {"stage_file", "stage_digest"} & set(facts("shipped"))


def test_a_failure_names_the_file(mine: Home, write: Write) -> None:
    path = write(
        HEAD + "import os\nclass Engine(gemm.STAGE.engine):\n"
        "    def train(self, *a):\n        os._exit(0)\n"
        "STAGE = replace(gemm.STAGE, name='mine', engine=Engine)\n"
    )
    mine("measure", "--stage", path, *RUN, "--out", "out", "--mark")
    assert facts("out")["status"] == "failed"
    assert facts("out")["stage_file"] == str(mine.folder / "mine.py")


def test_a_missing_library_is_an_unavailable_row(mine: Home, write: Write) -> None:
    path = write("import no_such_library\nSTAGE = no_such_library.make(name='mine')\n")
    said = mine("measure", "--stage", path, *RUN, "--out", "out")
    why = "stage 'mine' needs no_such_library, which is not installed (./mine.py, line 1)"
    assert said.startswith(f"mine, batch 8: unavailable: {why}")
    assert why in mine("plan", "--stage", path)
    assert mine("check", "--stage", path, code=1) == f"{why}\n"


def test_a_library_that_is_installed_later_is_noticed(
    mine: Home, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine.folder / "results/data").mkdir(parents=True)
    shutil.copy("toy.npz", "results/data/toy.npz")
    monkeypatch.syspath_prepend(str(mine.folder / "site"))
    write("", "site/other_library.py")
    listing(mine, write(SOUND + "import new_library\n"))
    assert "unavailable" in mine("sweep")
    assert mine("sweep") == ""
    write("", "site/new_library.py")
    importlib.invalidate_caches()
    forgetful(monkeypatch)
    assert "mine, batch 8: ok" in mine("sweep")


def test_train(mine: Home, write: Write) -> None:
    said = mine("train", "--stage", write(SOUND), "--data", "toy.npz", "--out", "w.npz")
    assert "by stage mine, batch 8" in said


def test_a_broken_file_is_refused_by_every_command(mine: Home, write: Write) -> None:
    path = write("\n\nSTAGE = undefined\n")
    what = f"stage {path} in --stage cannot be used: NameError"
    for command in (
        ("check", "--stage", path),
        ("measure", "--stage", path, *RUN, "--out", "out"),
        ("train", "--stage", path, "--data", "toy.npz", "--out", "w.npz"),
        ("plan", "--stage", path),
        ("profile", "--stage", path),
        ("show-source", "--stage", path),
    ):
        said = mine.fails(*command)
        assert what in said, command
        assert "(./mine.py, line 3)" in said
    listing(mine, "gemm", path)
    assert "in sweep.stages cannot be used" in mine.fails("sweep")
    assert set(mine.names()) - {"__pycache__"} == {"config.yaml", "mine.py", "toy.npz"}


def test_a_name_in_the_config_is_known_to_commands(mine: Home, write: Write) -> None:
    listing(mine, "gemm", write("1 / 0\n", "broken.py"), write(SOUND))
    assert "stage mine" in mine("plan", "--stage", "mine")
    assert "ok" in mine("measure", "--stage", "mine", *RUN, "--out", "out")


def test_two_entries_for_one_stage(mine: Home, write: Write) -> None:
    listing(mine, write(SOUND), "mine.py")
    said = mine.fails("sweep")
    assert "./mine.py and mine.py in sweep.stages are the same stage, 'mine'" in said


def test_only_what_is_edited_is_measured_again(
    mine: Home, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine.folder / "results/data").mkdir(parents=True)
    shutil.copy("toy.npz", "results/data/toy.npz")
    write("X = 1\n", "my_helper.py")
    listing(mine, "gemm", write(SOUND + "import my_helper\n"), write(OTHER, "other.py"))

    def swept() -> list[str]:
        forgetful(monkeypatch)
        return [line.split(": ")[1].split(",")[0] for line in mine("sweep").splitlines()]

    assert swept() == ["gemm", "mine", "other"]
    assert swept() == []
    write("X = 2\n", "my_helper.py")
    assert swept() == ["mine"]
    write(OTHER.replace("Another", "Yet another"), "other.py")
    assert swept() == ["other"]


def test_a_checkpoint_of_an_edited_stage_is_not_resumed(
    mine: Home, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = toy_config(measuring={"full": True}), Path("checkpoints")

    def file() -> Path:
        forgetful(monkeypatch)
        name = card_of("./mine.py", "--stage").name
        return checkpoint_file(config, Run("toy", "small", name, 8, 1), folder)

    write(SOUND)
    before = file()
    assert file() == before
    write(SOUND + "# edited\n")
    assert file() != before


def test_stages_lists_those_of_installed_packages(
    mine: Home, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(mine.folder))
    write(SOUND, "theirs.py")
    write("1 / 0\n", "broken_too.py")
    write("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n", "theirs-1.dist-info/METADATA")
    points = "[cnnlib.stages]\nmine = theirs\nbroken = broken_too:STAGE\n"
    write(points, "theirs-1.dist-info/entry_points.txt")
    assert re.search(r"(?m)^mine +cpu +", mine("stages"))
    main(["stages"])
    warning = (
        "warning: stage entry point broken = 'broken_too:STAGE' in an installed package cannot"
    )
    assert warning in mine.capture.readouterr().err
    assert "stage mine" in mine("plan", "--stage", "mine")
