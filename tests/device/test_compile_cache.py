"""Compiled code is kept by content: used again, rebuilt when damaged, and never half there."""

import os
import shutil
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cnnlib.device import cache_folder as places
from cnnlib.device.cache import (
    cache_folder,
    cached,
    content_key,
    content_of,
    included_files,
    kernels_folder,
)
from cnnlib.device.compiler import find_compiler, native_target
from cnnlib.device.emulated import EmulatedDevice
from cnnlib.errors import DeviceError

SOURCE = """#include "portable.cuh"
ENTRY_POINT(cached, write)(int* out) { out[threadIdx.x] = 42; }
"""


def runs(device: EmulatedDevice, source: str = SOURCE) -> bool:
    out = device.array(3, np.int32)
    device.compile(source, "cached.cu", ["cached_write"]).kernel("cached_write")(1, 3, out)
    return bool((out.get() == 42).all())


def replace(path: Path, data: bytes | bytearray) -> None:
    """Not in place: this process has the old file mapped, and may run it."""
    path.unlink()
    path.write_bytes(data)


class Compiler:
    """A compiler that notes what it builds."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.program = folder / "c++ that notes"
        real = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        self.program.write_text(
            f'#!/bin/sh\ncase "$*" in *-version*) ;; *) echo "$@" >> "{self.log}";; esac\n'
            f'exec {real} "$@"\n'
        )
        self.program.chmod(self.program.stat().st_mode | stat.S_IXUSR)

    def builds(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    noting = Compiler(tmp_path)
    monkeypatch.setenv("CXX", f"'{noting.program}'")
    monkeypatch.setenv("CNNLIB_CACHE", str(tmp_path / "cache"))
    return noting


def test_second_process_does_not_compile(compiler: Compiler) -> None:
    assert runs(EmulatedDevice())
    assert compiler.builds() == 2  # the runtime and the module
    assert runs(EmulatedDevice())
    assert compiler.builds() == 2
    entries = sorted(cache_folder().iterdir())
    assert [entry.suffix for entry in entries] == [".so", ".so"]  # and no leftovers

    assert runs(EmulatedDevice(), SOURCE.replace("= 42", "= 40 + 2"))
    assert compiler.builds() == 3

    # in a new process a damaged entry is built again; here the libraries are loaded already
    for entry in cache_folder().iterdir():
        data = bytearray(entry.read_bytes())
        data[len(data) // 2] ^= 1
        replace(entry, data)
    script = (
        "import numpy as np; from cnnlib.device.emulated import EmulatedDevice;"
        "d = EmulatedDevice();"
        "o = d.array(3, np.int32);"
        f"d.compile({SOURCE!r}, 'cached.cu', ['cached_write']).kernel('cached_write')(1, 3, o);"
        "assert (o.get() == 42).all()"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=120)
    assert compiler.builds() == 5
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=120)
    assert compiler.builds() == 5

    # emptied entries, as after a full disk, likewise
    for entry in cache_folder().iterdir():
        replace(entry, b"")
    # two at once
    both = [subprocess.Popen([sys.executable, "-c", script], cwd=root) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert compiler.builds() > 5
    assert {entry.suffix for entry in cache_folder().iterdir()} == {".so"}


def test_failed_build_leaves_nothing(compiler: Compiler) -> None:
    device = EmulatedDevice()
    before = sorted(cache_folder().iterdir())
    with pytest.raises(DeviceError, match=r"module broken.cu does not compile: .*error"):
        device.compile("int main( {", "broken.cu", [])
    assert sorted(cache_folder().iterdir()) == before


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"no C\+\+ compiler .*install one.*CXX") as caught:
        EmulatedDevice()
    assert "\n" not in str(caught.value)


def test_unknown_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    with pytest.raises(DeviceError, match="CXX=no-such-compiler -v: no such program"):
        EmulatedDevice()


def test_not_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(DeviceError, match="'false --version' fails"):
        EmulatedDevice()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CNNLIB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cnnlib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "cnnlib"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without a home folder and with a folder for temporary files: that folder."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("CNNLIB_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_without_a_home_the_cache_is_the_users_alone_in_a_temporary_place(homeless: Path) -> None:
    folder = cache_folder()
    assert folder == homeless / f"cnnlib-{os.geteuid()}" == cache_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("prepared", ["by all", "a link", "a file"])
def test_a_temporary_cache_that_others_may_have_prepared_is_not_taken(
    homeless: Path, monkeypatch: pytest.MonkeyPatch, prepared: str
) -> None:
    theirs = homeless / f"cnnlib-{os.geteuid()}"
    if prepared == "by all":
        theirs.mkdir()
        theirs.chmod(0o777)
    elif prepared == "a link":
        (homeless / "there").mkdir()
        theirs.symlink_to(homeless / "there")
    else:
        theirs.touch()
    monkeypatch.setattr(places, "TEMPORARY", (str(homeless),))
    with pytest.raises(DeviceError, match="no home folder to keep compiled code in; CNNLIB_CACHE"):
        cache_folder()


@pytest.mark.parametrize("home", ["/proc/nobody", "file/under"])
def test_a_home_that_cannot_be_written(
    homeless: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    (homeless / "file").touch()
    monkeypatch.setenv("HOME", str(homeless / home))
    assert cache_folder() == homeless / f"cnnlib-{os.geteuid()}"


NOEXEC = """
mount -t tmpfs -o noexec tmpfs "$0" && exec "$@"
"""
PROGRAM = """
from cnnlib.device import cache_folder as places
from cnnlib.device.cache import cache_folder
from cnnlib.device.emulated import EmulatedDevice
from cnnlib.errors import DeviceError
try:
    EmulatedDevice()
    print("works in", cache_folder())
except DeviceError as error:
    print(error)
"""


def on_noexec(folder: Path, **environment: str) -> str:
    """What a program says that opens the device where `folder` is mounted noexec."""
    folder.mkdir(exist_ok=True)
    private = ["unshare", "--mount"] + ["--map-root-user"] * (os.geteuid() != 0)
    command = [*private, "sh", "-c", NOEXEC, str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"]).returncode:
        pytest.skip("file systems cannot be mounted here")
    kept = {k: v for k, v in os.environ.items() if k not in ("CNNLIB_CACHE", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [*command, sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        env=kept | environment,
        text=True,
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert not list(folder.iterdir())
    return done.stdout


def test_a_home_mounted_noexec(tmp_path: Path) -> None:
    said = on_noexec(tmp_path / "home", HOME=str(tmp_path / "home"), TMPDIR=str(tmp_path))
    assert said == f"works in {tmp_path}/cnnlib-{os.geteuid()}\n"


def test_a_chosen_cache_mounted_noexec_is_named_before_anything_is_built(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    (line,) = on_noexec(folder, CNNLIB_CACHE=str(folder / "cache")).splitlines()
    assert line == (
        f"compiled code cannot be run from {folder}/cache, whose file system is mounted noexec; "
        "CNNLIB_CACHE can name another folder"
    )


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CNNLIB_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(DeviceError, match=r"cannot write .*CNNLIB_CACHE can name another"):
        EmulatedDevice()


def test_keys_tell_parts_apart(tmp_path: Path) -> None:
    file = tmp_path / "f.cuh"
    file.write_text("one")
    keys = [content_key(["ab", "c"], [file]), content_key(["a", "bc"], [file])]
    file.write_text("two")
    keys += [content_key(["ab", "c"], [file]), content_key(["ab", "c"])]
    assert len(set(keys)) == 4


def test_content_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CNNLIB_CACHE", str(tmp_path))
    built: list[Path] = []

    def build(path: Path) -> None:
        built.append(path)
        path.write_bytes(b"some code")

    path = cached("key", ".cubin", build)
    assert content_of(path) == b"some code"
    assert cached("key", ".cubin", build) == path
    assert len(built) == 1
    path.write_bytes(path.read_bytes()[:-1])
    assert content_of(cached("key", ".cubin", build)) == b"some code"
    assert len(built) == 2
    assert os.listdir(tmp_path) == ["key.cubin"]


def test_what_is_built_meanwhile_is_not_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CNNLIB_CACHE", str(tmp_path))
    built: list[Path] = []

    def build(path: Path) -> None:
        built.append(path)
        time.sleep(0.1)
        path.write_bytes(b"some code")

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: cached("key", ".so", build), range(4)))
    assert paths == [tmp_path / "key.so"] * 4
    assert len(built) == 1


def test_what_a_source_includes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By way of others, beside a file before elsewhere, below any #if; none outside the folder."""
    texts = {
        "a.cuh": '#pragma once\n#ifdef EMULATED\n  # include "emulated/deep.hpp"\n#endif\n',
        "emulated/deep.hpp": '#include "beside.hpp"\n#include <vector>\n',
        "emulated/beside.hpp": '#include "../b.cuh"\n#include "deep.hpp"\n',
        "beside.hpp": "",
        "b.cuh": '#include "cuda_fp16.h"\n',
        "unused.cuh": '#include "a.cuh"\n',
    }
    (tmp_path / "emulated").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("CNNLIB_KERNELS", str(tmp_path))
    found = included_files('#include "a.cuh"\n', '#include "nowhere.cuh"\n')
    names = ["a.cuh", "b.cuh", "emulated/beside.hpp", "emulated/deep.hpp"]
    assert found == [tmp_path / name for name in names]


def test_included_files_are_those_that_the_compiler_reads() -> None:
    """The files of the largest kernel: a missing one would leave old code in the cache."""
    folder = kernels_folder()
    source = folder / "tuned" / "step.cuh"
    command = [*find_compiler().command, "-MM", "-x", "c++", "-std=gnu++17", str(source)]
    listed = subprocess.run(
        [*command, "-I", str(folder)], capture_output=True, text=True, check=True
    ).stdout
    read = {Path(name).resolve() for name in listed.replace("\\\n", " ").split()[1:]}
    assert read <= set(included_files('#include "tuned/step.cuh"\n'))
    assert folder / "portable.cuh" in read


def test_an_edit_builds_anew_only_what_includes_it(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(kernels_folder(), folder)
    monkeypatch.setenv("CNNLIB_KERNELS", str(folder))
    assert runs(EmulatedDevice())
    assert compiler.builds() == 2
    for name, builds in (("ring/conv.cuh", 2), ("portable.cuh", 3)):
        with open(folder / name, "a") as out:
            out.write("// edited\n")
        assert runs(EmulatedDevice())
        assert compiler.builds() == builds


def test_each_level_of_optimisation_is_built(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is the third; kernels without optimisation share the first one's runtime."""
    for level, builds in (("1", 2), ("2", 4), ("3", 6), ("", 6), ("1", 6), ("0", 7)):
        monkeypatch.setenv("CNNLIB_OPTIMIZE", level)
        assert runs(EmulatedDevice())
        assert compiler.builds() == builds
    monkeypatch.setenv("CNNLIB_OPTIMIZE", "fast")
    with pytest.raises(DeviceError, match="CNNLIB_OPTIMIZE=fast: expected 0, 1, 2 or 3"):
        EmulatedDevice()


FUSED = """
#include "portable.cuh"
ENTRY_POINT(fused, multiply_add)(float a, float b, float c, float* out) { out[0] = a * b + c; }
"""


@pytest.mark.skipif(
    not {"fma", "aarch64", "arm64"} & set(native_target().split()),
    reason="no such instruction here",
)
@pytest.mark.parametrize("level", ["1", "2", "3"])
def test_products_and_sums_are_fused_at_every_level_but_the_lowest(
    monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """As nvcc does: what is lost in rounding the product is left when it is taken away."""
    monkeypatch.setenv("CNNLIB_OPTIMIZE", level)
    device = EmulatedDevice()
    kernel = device.compile(FUSED, "fused.cu", ["fused_multiply_add"]).kernel("fused_multiply_add")
    out = device.array(1)
    factor = np.float32(1 + 2**-12)
    kernel(1, 1, float(factor), float(factor), -float(factor * factor), out)
    assert out.get()[0] == 2.0**-24
