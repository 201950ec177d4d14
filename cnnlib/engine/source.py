"""The generated CUDA source of an engine: kernel files with their constants."""

from collections.abc import Mapping

# Included once, outside every namespace, before the kernel files that say they need them.
HEADERS = ("portable.cuh", "layers.cuh", "matmul.cuh", "conv.cuh", "async.cuh")


def kernel_source(label: str, file: str, constants: Mapping[str, int | str]) -> str:
    """One kernel file with its constants, in a namespace of its own."""
    lines = [f"constexpr int {name} = {value};" for name, value in constants.items()]
    return "\n".join(
        [
            f"#define LAYER {label}",
            f"namespace {label} {{",
            *lines,
            f'#include "{file}"',
            "}",
            "#undef LAYER",
            "",
        ]
    )
