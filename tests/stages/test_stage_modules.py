"""A broken module of a stage is reported in one line, and all other stages work."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from cnnlib import stages
from cnnlib.engine import Stage
from cnnlib.errors import BrokenStage, ConfigError
from cnnlib.paths import ROOT
from cnnlib.stages import _loading, find_stage, gemm, naive
from tests.support.toys import toy_config, toy_data, write_config

HEAD = "import dataclasses\nfrom cnnlib.stages import gemm\n"


def module(name: str, *changes: str) -> str:
    """The text of a module whose stage is gemm with another name and these changes."""
    fields = ", ".join([f"name={name!r}", *changes])
    return f"{HEAD}STAGE = dataclasses.replace(gemm.STAGE, {fields})\n"


Load = Callable[..., tuple[Stage, ...]]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Write a module `mine` and load it behind stages naive and gemm."""
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(tmp_path)])
    monkeypatch.setattr(_loading, "FOLDER", tmp_path)
    broken: dict[str, str] = {}
    monkeypatch.setattr(_loading, "BROKEN", broken)
    monkeypatch.setattr(stages, "BROKEN", broken)

    def load(text: str) -> tuple[Stage, ...]:
        (tmp_path / "mine.py").write_text(text)
        sys.modules.pop("cnnlib.stages.mine", None)
        broken.clear()
        ladder, variants = _loading.records(["gemm", "mine", "naive"])
        monkeypatch.setattr(stages, "LADDER", ladder)
        monkeypatch.setattr(stages, "VARIANTS", variants)
        return tuple(each for each in (*ladder, *variants) if each not in (naive.STAGE, gemm.STAGE))

    yield load
    sys.modules.pop("cnnlib.stages.mine", None)
    vars(stages).pop("mine", None)


def refused(name: str = "mine") -> str:
    assert find_stage("gemm", "sweep.stages") is gemm.STAGE
    with pytest.raises(ConfigError) as caught:
        find_stage(name, "sweep.stages")
    line = str(caught.value)
    assert "\n" not in line
    assert f"stage '{name}' in sweep.stages" in line
    return line


def test_a_sound_module(load: Load) -> None:
    (stage,) = load(module("mine"))
    assert find_stage("mine", "sweep.stages") is stage
    assert _loading.module_of(stage) == "cnnlib/stages/mine.py"
    assert stages.problems() == []


def test_a_module_and_a_package_of_the_folder_are_found(tmp_path: Path, load: Load) -> None:
    for name in ("other.py", "_helper.py", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning/__init__.py").touch()
    load(module("mine"))
    assert _loading.modules() == ["mine", "other", "tuning"]


def test_variants_are_found_and_are_no_rungs(load: Load) -> None:
    text = module("mine") + "VARIANTS = (dataclasses.replace(STAGE, name='mine_too'),)\n"
    stage, variant = load(text)
    assert (stage.name, variant.name) == ("mine", "mine_too")
    assert stages.LADDER[1:] == (gemm.STAGE, stage)
    assert find_stage("mine_too", "sweep.stages") is variant
    assert _loading.module_of(variant) == "cnnlib/stages/mine.py"


def test_a_variant_that_is_no_stage(load: Load) -> None:
    (stage,) = load(
        module("mine") + "VARIANTS = (dataclasses.replace(STAGE, name='too', slack=0),)"
    )
    assert stage.name == "mine"
    assert "cnnlib/stages/mine.py: a variant.slack is 0, not a positive number" in refused("too")


def test_variants_without_a_comma(load: Load) -> None:
    assert len(load(module("mine") + "VARIANTS = (STAGE)")) == 1
    assert stages.problems() == [
        "stage 'mine' cannot be used: cnnlib/stages/mine.py: VARIANTS is a Stage, not a tuple of "
        "Stages (is there a comma after the last one?)"
    ]


def test_a_stage_after_an_unknown_one(load: Load) -> None:
    assert load(module("mine", "after='rign'")) == ()
    line = refused()
    assert "STAGE.after is 'rign', which is no stage; known: gemm, mine, naive" in line
    assert stages.LADDER == (naive.STAGE, gemm.STAGE)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("STAGE = (1,\n\ndef f(: pass\n", r"cnnlib/stages/mine\.py, line [13]\)$"),
        ("import no_such_library\n", r"ModuleNotFoundError: .*no_such_library.* line 1\)$"),
        ("\nSTAGE = Stage()\n", r"NameError: name 'Stage' is not defined .*mine\.py, line 2\)$"),
        ("import sys\nsys.exit(3)\n", r"mine\.py: SystemExit: 3 \(cnnlib/stages/mine\.py, line 2"),
        ("raise BaseException\n", r"mine\.py: BaseException \(cnnlib/stages/mine\.py, line 1\)$"),
        ("raise ValueError('a\\nb')\n", r"mine\.py: ValueError: a b \("),
        ("", r"cnnlib/stages/mine\.py has no STAGE$"),
        ("STAGE = None", r"mine\.py has no STAGE$"),
        (
            module("mine").rstrip() + ",\n",
            r"py: STAGE is a tuple, not a Stage \(is there a comma after its last bracket\?\)$",
        ),
        ("from cnnlib.engine import Stage\nSTAGE = Stage\n", r"STAGE is a type, not a Stage"),
        ("STAGE = 'gemm'\n", r"STAGE is a str, not a Stage$"),
        (HEAD + "STAGE = dataclasses.replace(gemm.STAGE, nam='mine')", "TypeError: .*'nam'"),
    ],
)
def test_a_module_that_is_no_stage(load: Load, text: str, problem: str) -> None:
    assert load(text) == ()
    line = refused()
    assert "cannot be used: cnnlib/stages/mine.py" in line
    assert re.search(problem, line)
    assert stages.problems() == [line.replace(" in sweep.stages", "")]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("title=3", r"STAGE\.title is 3, not a text$"),
        ("change=None", r"STAGE\.change is None, not a text$"),
        ("after=None", r"STAGE\.after is None, not the name of a stage$"),
        ("color='blue'", r"STAGE\.color is 'blue', not a colour such as '#0072b2'$"),
        ("marker='oo'", r"STAGE\.marker is 'oo', not a character$"),
        ("runs_on='tpu'", r"STAGE\.runs_on is 'tpu', not 'cpu' or 'cuda' or 'any'$"),
        (
            "engine='MicroBatchEngine'",
            r"STAGE\.engine is 'MicroBatchEngine', not a class derived from Eng",
        ),
        ("engine=int", r"STAGE\.engine is <class 'int'>, not a class derived from Engine$"),
        ("engine=lambda *a: None", r"STAGE\.engine is <function .*>, not a class derived from Eng"),
        ("operators=None", r"STAGE\.operators is None, not a mapping from tuples of kinds of lay"),
        ("operators={'conv': int}", r"STAGE\.operators is .*, not a mapping from tuples"),
        (
            "operators={k[0]: v for k, v in gemm.STAGE.operators.items()}",
            r"STAGE\.operators .* not a mapping from",
        ),
        ("operators={(): int}", r"STAGE\.operators is .*, not a mapping from tuples"),
        ("dtype='float23'", r"STAGE\.dtype is 'float23', not a kind of floating point number$"),
        ("dtype=int", r"STAGE\.dtype is <class 'int'>, not a kind of floating point number$"),
        ("dtype=None", r"STAGE\.dtype is None, not a kind of floating point number$"),
        ("rounding='fine'", r"STAGE\.rounding is 'fine', not a positive number or None$"),
        ("rounding=-1e-3", r"STAGE\.rounding is -0\.001, not a positive number or None$"),
        ("slack=0", r"STAGE\.slack is 0, not a positive number$"),
        ("slack=float('nan')", r"STAGE\.slack is nan, not a positive number$"),
        ("slack=True", r"STAGE\.slack is True, not a positive number$"),
        ("conv_weight_slack=[8]", r"STAGE\.conv_weight_slack is \[8\], not a positive number or"),
        ("threads=0", r"STAGE\.threads is 0, not a whole number from 1 on or None$"),
        ("threads=2.0", r"STAGE\.threads is 2\.0, not a whole number from 1 on or None$"),
        ("options=['graph']", r"STAGE\.options is \['graph'\], not Options\(\.\.\.\) or None$"),
    ],
)
def test_a_field_of_the_wrong_kind(load: Load, change: str, problem: str) -> None:
    assert load(module("mine", change)) == ()
    assert re.search(rf"cnnlib/stages/mine\.py: {problem}", refused())


def test_options_of_another_engine(load: Load) -> None:
    text = "from cnnlib.engine import Options\nfrom cnnlib.stages import ring\n"
    assert load(text + module("mine", "engine=ring.STAGE.engine", "options=Options()")) == ()
    assert refused().endswith("STAGE.options is Options(), not GpuOptions(...) or None")


@pytest.mark.parametrize("name", ["'my stage'", "'a/b'", "''", "7", "None", "'näh\\n'"])
def test_a_name_that_cannot_be_used(load: Load, name: str) -> None:
    """A stage's name becomes part of paths and of names of rules."""
    assert load(f"{HEAD}STAGE = dataclasses.replace(gemm.STAGE, name={name})\n") == ()
    (problem,) = stages.problems()
    assert "\n" not in problem
    assert "cnnlib/stages/mine.py: STAGE.name is " in problem
    assert "not a name of letters, digits, - and _" in problem


def test_methods_that_are_missing_are_named(load: Load) -> None:
    text = "from cnnlib.engine import Engine\nclass Half(Engine):\n    def load(self, *a): pass\n"
    assert load(text + module("mine", "engine=Half")) == ()
    line = refused()
    assert "STAGE.engine is Half, which lacks backward, gradient, logits, parameters" in line


def test_a_broken_module_with_another_name_than_its_stages(load: Load) -> None:
    """A broken stage is known by its own name where its record has one."""
    assert load(module("wheels", "slack=0")) == ()
    assert "cannot be used: cnnlib/stages/mine.py: STAGE.slack is 0" in refused("wheels")
    assert "(unusable: cnnlib/stages/mine.py: STAGE.slack is 0" in refused("mine")


def test_two_stages_of_one_name(load: Load) -> None:
    load(module("gemm"))
    with pytest.raises(BrokenStage) as caught:
        find_stage("gemm", "sweep.stages")
    assert str(caught.value) == (
        "stage 'gemm' in sweep.stages is ambiguous: cnnlib/stages/gemm/__init__.py and "
        "cnnlib/stages/mine.py both have it; rename one"
    )
    assert find_stage("jax", "sweep.stages").name == "jax"


def test_a_broken_copy_is_not_taken_for_the_stage_it_was_copied_from(load: Load) -> None:
    load(module("gemm", "slack=0"))
    with pytest.raises(BrokenStage, match=r"'gemm' .* cannot be used: cnnlib/stages/mine\.py: "):
        find_stage("gemm", "sweep.stages")


# Whole commands on a copy of the package with several broken modules

MODULES = {
    "broken": "def f(:\n",
    "tupled": module("tupled").rstrip() + ",\n",
    "poor": module("poor", "operators={}"),
    "crashes": "import ctypes\n" + HEAD + "class Engine(gemm.STAGE.engine):\n"
    "    def train(self, *a):\n        ctypes.string_at(0)\n"
    "STAGE = dataclasses.replace(gemm.STAGE, name='crashes', engine=Engine)\n",
    "hangs": "import time\n" + HEAD + "class Engine(gemm.STAGE.engine):\n"
    "    def train(self, *a):\n        time.sleep(99)\n"
    "STAGE = dataclasses.replace(gemm.STAGE, name='hangs', engine=Engine)\n",
    "leaves": "import os\n" + HEAD + "class Engine(gemm.STAGE.engine):\n"
    "    def gradient(self, *a):\n        os._exit(0)\n"
    "STAGE = dataclasses.replace(gemm.STAGE, name='leaves', engine=Engine)\n",
    "raises": HEAD + "class Engine(gemm.STAGE.engine):\n"
    "    def load(self, *a):\n        raise RuntimeError('no wheels')\n"
    "    train = load\n"
    "STAGE = dataclasses.replace(gemm.STAGE, name='raises', engine=Engine)\n",
    "sound": module("sound"),
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of cnnlib with MODULES among its stages, a data set and a config."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("cnnlib", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name, text in MODULES.items():
        (folder / f"cnnlib/stages/{name}.py").write_text(text)
    (folder / "results/data").mkdir(parents=True)
    toy_data(folder)
    (folder / "toy.npz").rename(folder / "results/data/toy.npz")
    write_config(folder / "config.yaml", toy_config(measuring={"limit_seconds": 20.0}))
    return folder


def cnnlib(package: Path, *arguments: str, code: int) -> tuple[str, str]:
    """Run the command; returns its standard output and its standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "cnnlib", *arguments],
        cwd=package,
        capture_output=True,
        text=True,
        timeout=300,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def sweep_of(
    package: Path, *names: str, limit: float = 20.0, batch_sizes: Sequence[int] = (8,)
) -> None:
    config = toy_config(measuring={"limit_seconds": limit}, sweep={"batch_sizes": [*batch_sizes]})
    text = (write_config(package / "config.yaml", config)).read_text()
    listed = "\n".join(f"  - {name}" for name in names)
    assert text.count("  stages:\n  - gemm") == 1
    (package / "config.yaml").write_text(
        text.replace("  stages:\n  - gemm", f"  stages:\n{listed}")
    )


def test_other_stages_work_beside_broken_ones(package: Path) -> None:
    out, err = cnnlib(package, "stages", code=0)
    assert {"sound", "crashes", "gemm"} <= {line.split()[0] for line in out.splitlines()}
    assert not {"broken", "tupled"} & {line.split()[0] for line in out.splitlines()}
    assert len(err.splitlines()) == 2
    for line, name in zip(err.splitlines(), ("broken", "tupled"), strict=True):
        assert line.startswith(f"warning: stage '{name}' cannot be used: cnnlib/stages/{name}.py: ")
    sweep_of(package, "sound", "gemm")
    out, err = cnnlib(package, "sweep", code=0)
    assert err == ""
    assert [line.split(": ")[2].partition(",")[0] for line in out.splitlines()] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("broken", "stage 'broken' in sweep.stages cannot be used: cnnlib/stages/broken.py: "),
        ("tupled", "stage 'tupled' in sweep.stages cannot be used: cnnlib/stages/tupled.py: "),
    ],
)
def test_a_broken_stage_that_is_asked_for_is_one_line(
    package: Path, name: str, problem: str
) -> None:
    sweep_of(package, "sound", name)
    out, err = cnnlib(package, "sweep", code=2)
    assert out == ""
    assert err.startswith(f"error: {problem}")
    assert len(err.splitlines()) == 1


def test_a_stage_that_lacks_an_operator_is_unavailable(package: Path) -> None:
    sweep_of(package, "poor", "naive")  # which no other test here measures
    out, err = cnnlib(package, "sweep", code=0)
    assert err == ""
    poor, good = (line.split(": ", 2)[2] for line in out.splitlines())
    assert poor.startswith("unavailable: stage 'poor' has no operator for conv1 of network 'small'")
    assert good.startswith("ok")


def test_check_prints_its_whole_table(package: Path) -> None:
    """Every stage gets a verdict, and every problem one line, even where processes die."""
    sweep_of(package, *MODULES, "gemm", limit=5.0, batch_sizes=(1, 7))
    out, err = cnnlib(package, "check", code=1)
    lines = [line.split() for line in out.splitlines()[1:]]
    verdicts: dict[str, set[str]] = {}
    for line in lines:
        verdicts.setdefault(line[0], set()).add(line[-1])
    assert verdicts == {
        "broken": {"broken"},
        "tupled": {"broken"},
        "poor": {"unavailable"},
        "crashes": {"died"},
        "hangs": {"hung", "skipped"},
        "leaves": {"died"},
        "raises": {"FAILED"},
        "sound": {"ok"},
        "gemm": {"ok"},
    }
    assert list(verdicts) == [*MODULES, "gemm"]
    for text in (
        "stage 'broken' in sweep.stages cannot be used: cnnlib/stages/broken.py: ",
        "stage 'tupled' in sweep.stages cannot be used: cnnlib/stages/tupled.py: STAGE is a tuple",
        "stage 'poor' has no operator for conv1",
        "stage 'crashes', network 'small', batch size 1: killed by SIGSEGV in train of "
        "cnnlib/stages/crashes.py:6",
        "stage 'hangs', network 'small', batch size 1: hangs in train of cnnlib/stages/hangs.py:6",
        "stage 'leaves', network 'small', batch size 1: ended its process with exit code 0",
        "stage 'raises', network 'small', batch size 1: RuntimeError: no wheels, in load of "
        "cnnlib/stages/raises.py:5",
    ):
        assert sum(line.startswith(text) for line in err.splitlines()) == 1, (text, err)
    assert "Traceback" not in err


LAYER = '''"""Doubles every element."""

from cnnlib.layers.base import Array, Layer, Shape, Views


class Double(Layer):
    kind = "double"
    shorthand = "times"

    times: int = 2

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def forward(self, parameters: Views, source: Array) -> Array:
        return source * self.times

    def backward(
        self, parameters: Views, source: Array, target: Array, target_error: Array
    ) -> tuple[Array, Views]:
        return target_error * self.times, {}
'''


def test_a_file_in_the_folder_of_layers_makes_a_layer(package: Path, tmp_path: Path) -> None:
    """The config knows it, stage 1 trains it, and the other stages refuse it by name."""
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    (copy / "cnnlib/layers/double.py").write_text(LAYER)
    sweep_of(copy, "naive", "gemm")
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    settings["networks"]["small"]["layers"].insert(1, {"double": 2})
    (copy / "config.yaml").write_text(yaml.safe_dump(settings))
    out, err = cnnlib(copy, "check", code=1)
    verdicts = {line.split()[0]: line.split()[-1] for line in out.splitlines()[1:]}
    assert verdicts == {"naive": "ok", "gemm": "unavailable"}
    assert "stage 'gemm' has no operator for double1 of network 'small'" in err


def test_an_unknown_stage_is_refused_by_check(package: Path) -> None:
    sweep_of(package, "gem")
    _, err = cnnlib(package, "check", code=2)
    assert err.startswith("error: unknown stage 'gem' in sweep.stages; known: naive, crashes, ")
    assert err.count("\n") == 1


def test_a_reference_that_does_not_parse_is_one_line(package: Path, tmp_path: Path) -> None:
    """Stage gemm is the reference of all others, so nothing can be compared without it."""
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    (copy / "cnnlib/stages/gemm/__init__.py").write_text("STAGE = (\n")
    sweep_of(copy, "naive")
    _, err = cnnlib(copy, "sweep", code=2)
    assert re.fullmatch(r"error: \S+/cnnlib/stages/gemm/__init__\.py, line 1: .*\n", err)
