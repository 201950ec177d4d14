"""The machine's C++ compiler, for the emulated device."""

import contextlib
import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cnnlib.device.api import KernelError
from cnnlib.errors import DeviceError
from cnnlib.system.machine import cpu_name

SANITIZERS = ("address", "undefined")

# g++ and clang++ write 'file:1:2: error:', nvcc 'file(1): error:', its parts 'ptxas fatal   :'.
# The first of these words in a line says what the line is: a warning's text may hold others.
_SEVERITY = re.compile(
    r"(?:^|[\s:;,)])(?:(warning|note|remark|info)"
    r"|(?:fatal |catastrophic |internal |compiler )*error|fatal)\s*(?:#[\w-]+)?\s*:",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"\s|\d+ \|")
# These lines end a failure; the line above them gives the reason.
_LAST_WORD = re.compile(
    r"ld returned \d+ exit status|linker command failed|Failed to preprocess host compiler"
)
_COLOURS = re.compile(r"\x1b\[[\d;]*[A-Za-z]")


class Compiler(NamedTuple):
    """A C++ compiler and how it is called here."""

    command: tuple[str, ...]
    version: str  # its first line about itself
    label: str  # e.g. 'g++ 12.2.0'

    @property
    def is_clang(self) -> bool:
        return "clang" in self.version


def find_compiler() -> Compiler:
    """$CXX, else g++, clang++ or c++ from PATH; DeviceError with the remedy when there is none."""
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        command = tuple(shlex.split(chosen))
        if shutil.which(command[0]) is None:
            raise DeviceError(
                f"device emulated: CXX={chosen}: no such program; set CXX to a C++17 compiler "
                "(g++ or clang++) or unset it"
            )
        return _describe(command, os.environ.get("PATH", ""))
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return _describe((name,), os.environ.get("PATH", ""))
    raise DeviceError(
        "device emulated: no C++ compiler (looked for g++, clang++ and c++ on PATH); install one, "
        "e.g. the package g++, or set CXX"
    )


def english() -> dict[str, str]:
    """The environment for a compiler whose output is read: messages in English, no colours."""
    return {**os.environ, "LC_ALL": "C"}


def version_text(command: Sequence[str]) -> str:
    """Return what `command --version` prints, in English.

    Raises OSError or SubprocessError when it does not run or fails.
    """
    return subprocess.run(
        [*command, "--version"],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=True,
        env=english(),
    ).stdout


@functools.cache
def _describe(command: tuple[str, ...], path: str) -> Compiler:
    del path  # part of the cache's key: another PATH may mean another program
    try:
        shown = version_text(command)
    except (OSError, subprocess.SubprocessError) as error:
        raise DeviceError(
            f"device emulated: '{shlex.join(command)} --version' fails: {error}"
        ) from error
    # a wrapper may have said something before it
    lines = [line for line in shown.splitlines() if _numbers(line)] or [shown.strip()[:200]]
    label = " ".join([Path(command[0]).name, *_numbers(lines[0])[-1:]])
    return Compiler(command, lines[0] or "unknown", label)


def _numbers(line: str) -> list[str]:
    """The words of a line that are version numbers."""
    return [word for word in line.split() if word[:1].isdigit() and "." in word]


@functools.cache
def native_target() -> str:
    """Everything that decides the code of `-march=native`: architecture, name and features."""
    features = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            field, _, value = line.partition(":")
            if field.strip() in ("flags", "Features"):
                features = " ".join(sorted(value.split()))
                break
    return f"{platform.machine()} {cpu_name()} {features}"


def sanitizers() -> tuple[str, ...]:
    """The sanitizers in CNNLIB_SANITIZE, e.g. address,undefined; DeviceError for unknown ones."""
    wanted = [name.strip() for name in os.environ.get("CNNLIB_SANITIZE", "").split(",")]
    names = tuple(name for name in wanted if name)
    for name in names:
        if name not in SANITIZERS:
            raise DeviceError(
                f"unknown sanitizer '{name}' in CNNLIB_SANITIZE; known: {', '.join(SANITIZERS)}"
            )
    return names


def optimization(least: int = 0) -> list[str]:
    """Flags for the level that CNNLIB_OPTIMIZE asks for, 3 by default; DeviceError for others.

    Level 0 compiles five times as fast as level 1 and runs a third as fast. Products and sums are
    fused at the other levels, which g++ counts among expensive optimisations. `least` is the lowest
    level to give.
    """
    level = os.environ.get("CNNLIB_OPTIMIZE", "").strip() or "3"
    if level not in ("0", "1", "2", "3"):
        raise DeviceError(f"CNNLIB_OPTIMIZE={level}: expected 0, 1, 2 or 3")
    level = max(level, str(least))
    return [f"-O{level}"] + ["-fexpensive-optimizations"] * (level == "1")


def compile_flags(compiler: Compiler, sanitize: tuple[str, ...], least: int = 0) -> list[str]:
    """Flags of every emulated build: the same arithmetic as on a GPU, nothing that drops a NaN.

    `least` is the lowest level of optimisation, where there are no sanitizers.
    """
    native = (
        "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    )
    flags = [
        "-std=gnu++17",
        native,
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-pthread",
    ]
    # products and sums are fused as nvcc does; no kernel reads errno or the exception flags
    flags += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-w" if compiler.is_clang else "-Wno-unknown-pragmas"]
    if sanitize:
        # five times as quick to compile as -O1 -g, and reports name the same lines
        flags += [
            "-O0",
            "-g1",
            f"-fsanitize={','.join(sanitize)}",
            "-fno-omit-frame-pointer",
        ]
        if "undefined" in sanitize:
            flags += ["-fno-sanitize-recover=undefined"]
        if compiler.is_clang:
            flags += ["-shared-libsan"]
    else:
        flags += optimization(least)
    if platform.system() == "Darwin":
        flags += ["-undefined", "dynamic_lookup"]
    return flags


def run_compiler(command: list[str], what: str, folder: Path) -> None:
    """Run a compiler in `folder`; KernelError with its first error line when it fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=folder,
            check=False,
            env=english(),
        )
    except OSError as error:
        raise DeviceError(f"{what}: cannot run {command[0]}: {error}") from error
    if done.returncode:
        raise KernelError(f"{what} does not compile: {first_error(done.stderr + done.stdout)}")


def first_error(output: str) -> str:
    """The first line of a compiler's output that reports an error, warnings passed over."""
    lines = [line.rstrip() for line in _COLOURS.sub("", output).splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if _LAST_WORD.search(line) and number:
            return f"{lines[number - 1].strip()}; {line.strip()}"
        found = None if _QUOTED.match(line) else _SEVERITY.search(line)
        if found and not found[1]:
            return line
    return lines[0].strip() if lines else "the compiler gave no reason"


def sanitizer_environment(sanitize: str = "address,undefined") -> dict[str, str]:
    """Environment for a Python process whose emulated kernels are to be built with sanitizers.

    AddressSanitizer's library must be loaded before Python's own allocations, hence LD_PRELOAD.
    Leaks are not looked for: Python itself keeps memory until the end. Use it as
    `subprocess.run([sys.executable, ...], env={**os.environ, **sanitizer_environment()})`, or from
    a shell: `env $(python -m cnnlib.device) python -m pytest tests/device`.
    Raises DeviceError when the compiler has no such library.
    """
    compiler = find_compiler()
    result = {"CNNLIB_SANITIZE": sanitize}
    if "address" in sanitize.split(","):
        machine = platform.machine()
        names = (
            (f"libclang_rt.asan-{machine}.so", "libclang_rt.asan.so")
            if compiler.is_clang
            else ("libasan.so",)
        )
        for name in names:
            found = subprocess.run(
                [*compiler.command, f"-print-file-name={name}"],
                capture_output=True,
                text=True,
                check=False,
                env=english(),
            ).stdout.strip()
            if os.path.isabs(found) and os.path.exists(found):
                result["LD_PRELOAD"] = os.path.realpath(found)
                break
        else:
            raise DeviceError(
                f"{compiler.label} has no AddressSanitizer library ({' or '.join(names)}); "
                "install it (e.g. the package libasan) or set CNNLIB_SANITIZE=undefined"
            )
        result["ASAN_OPTIONS"] = "detect_leaks=0:abort_on_error=0:exitcode=86"
        if compiler.is_clang:
            # llvm-symbolizer would inherit the preloaded library and hang
            result["ASAN_OPTIONS"] += ":symbolize=0"
    if "undefined" in sanitize.split(","):
        result["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return result
