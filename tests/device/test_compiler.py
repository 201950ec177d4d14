"""What a compiler says is understood in any language, behind warnings and in colour."""

import shutil
from pathlib import Path

import pytest

from cnnlib.device.compiler import find_compiler, first_error
from cnnlib.device.cuda import compile_cubin, find_nvcc
from cnnlib.device.emulated import EmulatedDevice
from cnnlib.errors import DeviceError

pytestmark = pytest.mark.quick

# A warning that holds the word, in its text, in its option and in the line that it quotes.
WARNED = """some.cu: In function 'int f()':
some.cu:3:5: warning: variable 'error' set but not used [-Werror=unused-but-set-variable]
    3 | int error; // error: none
      |     ^~~~~
3 | int fatal; // fatal error: none
some.cu:4:2: warning: #warning error: think again [-Wcpp]
some.cu(5): warning #177-D: variable "error" was declared but never referenced
  __attribute__((global)) void k() { int error = 1; }  // some.cu(5): error: none
In file included from error.h:3,
                 from some.cu:1:
"""
ERRORS = [
    "some.cu:9:9: error: 'y' was not declared in this scope",
    "some.cu:1:10: fatal error: nowhere.h: No such file or directory",
    'some.cu(2): error: identifier "y" is undefined',
    'some.cu(2): catastrophic error: cannot open source file "nowhere.h"',
    "error.cu:3:1: internal compiler error: Segmentation fault",
    "g++: fatal error: Killed signal terminated program cc1plus",
    "clang: error: unsupported option '-march=native'",
    "nvcc fatal   : Unsupported gpu architecture 'sm_999'",
    "ptxas error   : Entry function 'k' uses too much shared data (0x61a80 bytes, 0xc000 max)",
    "ptxas some.ptx, line 23; error   : Not a name of any known instruction: 'bogus'",
    "some.cu(7): error #20014-D: calling a __host__ function is not allowed",
]


@pytest.mark.parametrize("line", ERRORS)
@pytest.mark.parametrize("before", ["", WARNED], ids=["alone", "behind warnings"])
def test_the_error_is_found(before: str, line: str) -> None:
    assert first_error(f"{before}{line}\n   9 | y\n1 error generated.\nerror: another\n") == line


def test_colours_are_left_out() -> None:
    said = "\x1b[1msome.cu:9:9:\x1b[0m \x1b[01;31m\x1b[Kerror: \x1b[m\x1b[Kno \x1b[1m'y'\x1b[0m\n"
    assert first_error(said) == "some.cu:9:9: error: no 'y'"


@pytest.mark.parametrize(
    ("reason", "last"),
    [
        ("/usr/bin/ld: cannot find -lnowhere", "collect2: error: ld returned 1 exit status"),
        ("gcc: No such file", "nvcc fatal   : Failed to preprocess host compiler properties."),
    ],
)
def test_what_stands_above_the_last_word_is_said_too(reason: str, last: str) -> None:
    assert first_error(f"{WARNED}{reason}\n{last}\n") == f"{reason}; {last}"


def test_a_compiler_that_says_nothing_useful() -> None:
    assert first_error("") == "the compiler gave no reason"
    assert first_error("\nout of licences\nbye\n") == "out of licences"


# A compiler that speaks another language unless the environment asks for none, as g++ does once its
# translations are installed. With this one the test does not depend on that.
GERMAN = """#!/bin/sh
case "${LC_ALL:-$LC_MESSAGES$LANG}" in
    C) exec %s "$@" ;;
esac
case "$*" in
    *--version*) echo 'Deutscher Übersetzer 12.2.0' ;;
    *) echo 'some.cu:1:1: schwerwiegender Fehler: error_count' >&2; exit 1 ;;
esac
"""


@pytest.fixture
def abroad(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANGUAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de")
    monkeypatch.setenv("CNNLIB_CACHE", str(tmp_path / "cache"))


def test_messages_in_another_language(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abroad: None
) -> None:
    real = find_compiler()
    program = tmp_path / "c++"
    program.write_text(GERMAN % shutil.which(real.command[0]))
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    assert find_compiler().version == real.version
    source = '#include "portable.cuh"\nint f() { int error = 1; }\nint x = y;\n'
    with pytest.raises(DeviceError) as caught:
        EmulatedDevice().compile(source, "some.cu", [], ["-Wall"])
    assert "some.cu:3" in str(caught.value)
    assert "error: " in str(caught.value)


def test_messages_of_this_machines_compiler(abroad: None) -> None:
    """Translated where the translations and the language are installed."""
    source = "int f() { int error = 1; }\nint x = y;\n"
    with pytest.raises(DeviceError, match=r"module some.cu does not compile: .*:2:9: error: .*y"):
        EmulatedDevice().compile(source, "some.cu", [], ["-Wall"])


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc on PATH")
def test_messages_of_nvcc(abroad: None) -> None:
    source = "__global__ void k() { int error = 1; }\n__global__ void g() { int x = y; }\n"
    with pytest.raises(DeviceError, match=r'compile: some.cu\(2\): error: identifier "y"'):
        compile_cubin(source, "some.cu", "sm_90")


def test_a_version_behind_a_wrappers_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "c++"
    program.write_text(
        "#!/bin/sh\necho 'warning: the cache is full'\necho 'g++ (Debian 12.2.0-14) 12.2.0'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    assert find_compiler().label == "c++ 12.2.0"
