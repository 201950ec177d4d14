"""The text that is compiled for the emulated device."""

import re
from collections.abc import Sequence

from cnnlib.errors import DeviceError

_KERNEL_NAME = re.compile(r"[A-Za-z_]\w*\Z")


def with_launchers(source: str, name: str, kernels: Sequence[str]) -> str:
    """`source`, then for each kernel a C function that launches it with any arguments.

    Kernels are in the global namespace. Compiler messages call the source `name`.
    """
    for kernel in kernels:
        if not _KERNEL_NAME.match(kernel):
            raise DeviceError(f"module {name}: '{kernel}' cannot be the name of a kernel")
    label = name.replace("\\", "/").replace('"', "'").replace("\n", " ")
    lines = [
        f'#line 1 "{label}"',
        source.rstrip("\n"),
        f'#line 1 "launchers of {label}"',
    ]
    lines += ['#include "portable.cuh"']
    lines += [f"EMULATED_LAUNCHER({kernel})" for kernel in kernels]
    return "\n".join(lines) + "\n"
