"""What kernels of a watched emulated device have read and written (kernels/emulated/watch.hpp)."""

import ctypes
from dataclasses import dataclass, field

KINDS = {
    "barrier": "threads of a block meet at an element of shared memory with no barrier between",
    "threads": "threads of a block meet at an element of device memory with no barrier between",
    "copy": "an element of shared memory is used while an asynchronous copy to it is on its way",
    "blocks": "two blocks of a launch meet at an element of device memory",
}
"""Kind of a finding -> what it says."""


@dataclass
class Watched:
    """What the launches of one kernel did, added up."""

    launches: int = 0
    read: int = 0
    """Bytes of device memory that its threads asked for. Caches are not modelled."""
    written: int = 0
    findings: dict[str, str] = field(default_factory=dict)
    """A key of KINDS -> the first such meeting, in words."""


def note_launch(runtime: ctypes.CDLL, kernels: dict[str, Watched], name: str) -> None:
    """Add to `kernels` what the last launch did, which was one of the kernel `name`."""
    read, written = ctypes.c_uint64(), ctypes.c_uint64()
    text: bytes = runtime.emulated_watched(ctypes.byref(read), ctypes.byref(written))
    kernel = kernels.setdefault(name, Watched())
    kernel.launches += 1
    kernel.read += read.value
    kernel.written += written.value
    for line in text.decode(errors="replace").splitlines():
        kind, _, words = line.split("\t", 2)
        kernel.findings.setdefault(kind, words)


def link_flags(is_clang: bool) -> list[str]:
    """Flags that have the compiler call the runtime before every access of a kernel.

    These are calls to a thread sanitizer, whose own library is left out. At a higher level of
    optimisation some loops would become calls of the C library, which nothing sees.
    """
    without = ["-fno-sanitize-link-runtime"] if is_clang else ["-nodefaultlibs"]
    libraries = [] if is_clang else ["-lstdc++", "-lm", "-lc", "-lgcc_s", "-lgcc"]
    return ["-DEMULATED_WATCH=1", "-O1", "-fsanitize=thread", *without, *libraries]
