"""Stages from outside the repository: of a file, of a package's folder, of an installed package."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnnlib.device import Limits
from cnnlib.device.architecture import H100
from cnnlib.device.cache import content_key, included_files
from cnnlib.engine import Setup, Stage
from cnnlib.errors import BrokenStage, ConfigError, Unsupported
from cnnlib.measuring import cards
from cnnlib.measuring.cards import card_of
from cnnlib.measuring.runs import Run
from cnnlib.measuring.transfers import measure_transfers
from cnnlib.stages import find_stage, gemm, gemm_cuda, own_of
from cnnlib.stages._own_files import digest_of, own_files
from tests.support.networks import build
from tests.support.own_stages import HEAD, SOUND, Write, forgetful, writer
from tests.support.toys import toy_config, toy_data


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a file into the working directory, which begins empty; its path as a user writes it."""
    monkeypatch.chdir(tmp_path)
    forgetful(monkeypatch)
    yield from writer(tmp_path)


def refused(path: str) -> str:
    """The one line by which the stage is refused, by itself and as a card."""
    with pytest.raises(ConfigError) as caught:
        find_stage(path, "sweep.stages")
    line = str(caught.value)
    assert "\n" not in line
    assert path in line
    assert "sweep.stages" in line
    with pytest.raises(ConfigError, match="sweep.stages"):
        card_of(path, "sweep.stages")
    return line


def test_a_stage_that_differs_by_its_name(write: Write) -> None:
    path = write(SOUND)
    stage = find_stage(path, "--stage")
    assert (stage.name, stage.engine) == ("mine", gemm.STAGE.engine)
    assert find_stage("mine", "--stage") is stage
    own = own_of(stage)
    assert own is not None
    assert (own.source, own.file) == (path, Path("mine.py").absolute())
    assert own_of(gemm.STAGE) is None


def test_a_package_imports_its_own_modules(write: Write) -> None:
    write("NAME = 'packed'\n", "packed/names.py")
    text = HEAD + "from .names import NAME\nSTAGE = replace(gemm.STAGE, name=NAME)\n"
    path = write(text, "packed/__init__.py").removesuffix("/__init__.py")
    assert find_stage(path, "--stage").name == "packed"


def test_a_card_does_not_import_the_file_here(write: Write) -> None:
    path = write(SOUND)
    card = card_of(path, "sweep.stages")
    assert (card.name, card.title, card.runs_on) == ("mine", "My own", "cpu")
    assert not [name for name in sys.modules if re.fullmatch("cnnlib_own_.*_mine", name)]
    assert card_of("mine", "sweep.stages") == card
    assert find_stage("mine", "sweep.stages").title == "My own"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("STAGE = (1,\n\ndef f(: pass\n", r"\(\./mine\.py, line [13]\)$"),
        ("\nSTAGE = Stage()\n", r"NameError: name 'Stage' is not defined \(\./mine\.py, line 2\)$"),
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(\./mine\.py, line 2\)$"),
        ("raise ValueError('a\\nb')\n", r"ValueError: a b \(\./mine\.py, line 1\)$"),
        ("from cnnlib.layers import Konv\n", r"cannot import name 'Konv' .*line 1\)$"),
        ("import cnnlib.no_such\n", r"No module named 'cnnlib.no_such' \(\./mine\.py, line 1\)$"),
        ("", r"\./mine\.py has no STAGE$"),
        ("\nSTAGE = 3\n", r"\./mine\.py, line 2: STAGE is a int, not a Stage$"),
        (HEAD + "STAGE = replace(gemm.STAGE, name='x', slack=0)\n", r"line 3: STAGE.slack is 0"),
        (HEAD + "STAGE = replace(gemm.STAGE, name='-x')\n", r"STAGE.name is '-x', not a name of "),
        (HEAD + "STAGE = gemm.STAGE\n", r"name, .gemm., .* of \S+/gemm/__init__\.py; rename one$"),
        (
            "from cnnlib.engine import OwnLoop, Stage\nclass Loop(OwnLoop):\n"
            "    prepare = step = forward = None\n"
            "STAGE = Stage('x', 'x', 'x', runs_on='cuda', engine=Loop)\n",
            r"line 4: STAGE.runs_on is 'cuda', .* a loop .* says 'any'$",
        ),
        ("from cnnlib.stages import find_stage\nfind_stage('./mine.py', '-')\n", "asks for itself"),
    ],
)
def test_a_broken_file(write: Write, text: str, problem: str) -> None:
    path = write(text)
    line = refused(path)
    with pytest.raises(BrokenStage, match=problem):
        find_stage(path, "sweep.stages")
    assert line.startswith(f"stage {path} in sweep.stages cannot be used: ")


def test_a_file_that_ends_its_process(write: Write) -> None:
    path = write("import os\nos._exit(0)\n")
    with pytest.raises(BrokenStage, match=r"\./mine.py .* ended its process with exit code 0"):
        card_of(path, "sweep.stages")


def test_a_file_that_takes_too_long(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "LOAD_SECONDS", 0.3)
    path = write("import time\ntime.sleep(60)\n")
    with pytest.raises(BrokenStage, match=r"\./mine.py .*hangs.* in <module> of mine.py:2"):
        card_of(path, "sweep.stages")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("./none.py", r"there is no file /.*/none\.py"),
        ("../../etc", r"there is no file /.*/etc|is a folder without an __init__.py"),
        ("./notes.txt", r"is no Python file"),
        ("./", r"\./ in sweep.stages is a folder without an __init__.py"),
    ],
)
def test_no_file(write: Write, path: str, problem: str) -> None:
    write("", "notes.txt")
    refused(path)
    with pytest.raises(ConfigError, match=problem):
        find_stage(path, "sweep.stages")


def test_two_files_with_one_name(write: Write) -> None:
    first, second = write(SOUND), write(SOUND, "other.py")
    find_stage(first, "sweep.stages")
    assert "its name, 'mine', is also that of ./mine.py; rename one" in refused(second)


def test_a_missing_library_makes_an_unavailable_stage(write: Write) -> None:
    path = write("import no_such_library\nSTAGE = make(name='mine_fast')\n")
    stage = find_stage(path, "--stage")
    assert stage.name == "mine_fast"
    setup = Setup(build("toy", (1, 8, 8), 3, [{"dense": 3}]), 4, 0.1)
    why = r"stage 'mine_fast' needs no_such_library, which is not installed \(\./mine\.py, line 1\)"
    with pytest.raises(Unsupported, match=why):
        stage.engine(stage, setup)
    with pytest.raises(Unsupported, match=why):
        stage.engine.operators_on(stage, setup, None)


def test_what_a_file_prints_and_reads(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["cnnlib", "--secret"])
    path = write("import sys\nprint(sys.argv)\n" + SOUND)
    find_stage(path, "--stage")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{[str(Path('mine.py').absolute())]}\n"
    assert sys.argv == ["cnnlib", "--secret"]


def test_modules_beside_a_file(write: Write) -> None:
    write("NAME = 'with_helper'\n", "my_helper.py")
    path = write(HEAD + "import my_helper\nSTAGE = replace(gemm.STAGE, name=my_helper.NAME)\n")
    own = own_of(find_stage(path, "--stage"))
    assert own is not None
    assert [file.name for file in own.files] == ["mine.py", "my_helper.py"]


def test_a_module_beside_a_file_that_a_library_hides(write: Write) -> None:
    write("NAME = 'mine'\n", "numpy.py")
    path = write(SOUND + "import numpy\n")
    assert "import numpy means " in refused(path)


def test_kernels_beside_a_file(write: Write) -> None:
    write('#include "layers.cuh"\n#include "more.h"\n', "my_relu.cuh")
    write("", "more.h")
    write("", "not_used.cuh")
    path = write(
        "from dataclasses import replace\n"
        "from cnnlib.layers import Activation\n"
        "from cnnlib.stages.gemm_cuda import STAGE as OTHER, GemmActivation\n"
        "class MyRelu(GemmActivation):\n"
        '    """Not made of not_used.cuh."""\n'
        "    file = 'my_relu.cuh'\n"
        "OPERATORS = {**OTHER.operators, (Activation,): MyRelu}\n"
        "STAGE = replace(OTHER, name='mine', operators=OPERATORS)\n"
    )
    stage = find_stage(path, "--stage")
    source = source_of(stage, H100.limits)
    assert f'#include "{Path("my_relu.cuh").absolute()}"\n' in source
    assert "\nMY_RELU_KERNELS(activation1)\n" in source
    assert '#include "gemm/activation.cuh"\n' in source_of(gemm_cuda.STAGE, H100.limits)
    own = own_of(stage)
    assert own is not None
    assert [file.name for file in own.files] == ["mine.py", "more.h", "my_relu.cuh"]


def source_of(stage: Stage, limits: Limits) -> str:
    network = build("toy", (1, 8, 8), 3, [{"dense": 3}, {"activation": "relu"}, {"dense": 3}])
    return stage.engine.source_on(stage, Setup(network, 4, 0.1), limits)


def test_an_edit_of_a_kernel_beside_a_file_is_compiled_again(write: Write) -> None:
    write('#include "layers.cuh"\n#include "more.h"\n', "my_relu.cuh")
    write("", "more.h")
    source = f'#include "{Path("my_relu.cuh").absolute()}"\n'
    names = [path.name for path in included_files(source)]
    assert {"my_relu.cuh", "more.h", "layers.cuh", "portable.cuh"} <= set(names)
    before = content_key([source], included_files(source))
    write("// edited\n", "more.h")
    assert content_key([source], included_files(source)) != before


def test_the_digest_changes_with_each_file(write: Write) -> None:
    write("X = 1\n", "my_helper.py")
    path = write(SOUND + "import my_helper\n")
    own = own_of(find_stage(path, "--stage"))
    assert own is not None
    assert digest_of(own_files(own.file), own.file.parent) == own.digest
    write("", "unrelated.py")
    assert digest_of(own_files(own.file), own.file.parent) == own.digest
    write("X = 2\n", "my_helper.py")
    assert digest_of(own_files(own.file), own.file.parent) != own.digest


@pytest.fixture
def installed(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Install a package with one entry point: a dist-info beside its modules, as pip makes it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(text: str, point: str, name: str = "their_package/__init__.py") -> str:
        write(text, name)
        write("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n", "theirs-1.dist-info/METADATA")
        return write(f"[cnnlib.stages]\n{point}\n", "theirs-1.dist-info/entry_points.txt")

    return install


@pytest.mark.parametrize("value", ["their_package", "their_package:STAGE", "their_package:FAST"])
def test_a_stage_of_an_installed_package(installed: Write, value: str) -> None:
    installed(SOUND + "FAST = replace(STAGE)\n", f"mine = {value}")
    card = card_of("mine", "sweep.stages")
    assert "their_package" not in sys.modules
    assert (card.name, card.title, card.entry) == ("mine", "My own", "mine")
    own = own_of(find_stage("mine", "sweep.stages"))
    assert own is not None
    assert own.source == f"entry point mine = {value!r}"
    assert [file.name for file in own.files] == ["__init__.py"]


def test_a_module_within_an_installed_package(installed: Write, write: Write) -> None:
    write("", "their_package/__init__.py")
    write("", "their_package/more/kernels.cuh")
    installed(SOUND, "mine = their_package.more.fast", "their_package/more/fast.py")
    write("", "their_package/more/__init__.py")
    own = own_of(find_stage("mine", "--stage"))
    assert own is not None
    assert [str(file.relative_to(Path.cwd())) for file in own.files] == [
        "their_package/__init__.py",
        "their_package/more/__init__.py",
        "their_package/more/fast.py",
        "their_package/more/kernels.cuh",
    ]


def test_a_single_installed_module_is_not_made_of_its_neighbours(
    installed: Write, write: Write
) -> None:
    write("", "some_library.py")
    installed(SOUND + "import some_library\n", "mine = their_module", "their_module.py")
    own = own_of(find_stage("mine", "--stage"))
    assert own is not None
    assert [file.name for file in own.files] == ["their_module.py"]


@pytest.mark.parametrize(
    ("text", "point", "problem"),
    [
        (SOUND, "other = their_package", r"the name of its stage is another, 'mine'$"),
        (
            "1 / 0\n",
            "other = their_package",
            r"ZeroDivisionError: .* \(\./their_package/.*line 1\)$",
        ),
        (SOUND, "other = their_package:NO", r"has no attribute 'NO'$"),
        ("", "other = their_package", r"their_package/__init__\.py has no STAGE$"),
    ],
)
def test_a_broken_entry_point(installed: Write, text: str, point: str, problem: str) -> None:
    installed(text, point)
    with pytest.raises(BrokenStage, match=problem) as caught:
        find_stage("other", "--stage")
    assert "entry point other = 'their_package" in str(caught.value)
    with pytest.raises(BrokenStage, match=problem):
        card_of("other", "--stage")


def test_an_entry_point_that_lacks_a_library(installed: Write) -> None:
    installed("import no_such_library\n", "mine = their_package")
    stage = find_stage("mine", "--stage")
    assert "needs no_such_library, which is not installed" in stage.change


def test_an_entry_point_of_a_module_that_is_not_there(installed: Write) -> None:
    installed("", "mine = another_package")
    assert "needs another_package, which is not installed" in find_stage("mine", "--stage").change


def test_an_entry_point_with_the_name_of_a_shipped_stage(installed: Write) -> None:
    installed(SOUND.replace("mine", "gemm"), "gemm = their_package")
    both = r"cnnlib/stages/gemm\S*\.py has it, and so has entry point gemm = 'their_package'"
    with pytest.raises(BrokenStage, match=both):
        find_stage("gemm", "sweep.stages")
    assert find_stage("ring", "sweep.stages").name == "ring"


def test_an_engine_of_ones_own_for_a_gpu_has_no_transfers(write: Write, tmp_path: Path) -> None:
    data = toy_data(tmp_path)[1]
    find_stage(write(SOUND.replace("name=", "runs_on='cuda', name=")), "--stage")
    with pytest.raises(Unsupported, match="'mine' loads nothing onto a GPU in a way"):
        measure_transfers(toy_config(), Run("toy", "small", "mine", 8, 1), data, tmp_path / "t.csv")
