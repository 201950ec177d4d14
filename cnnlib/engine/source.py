"""The generated CUDA source of an engine: sizes, and which kernels are made of them.

A kernel file (a header of kernels/) has its kernels as templates over a layer, a struct of sizes,
and a macro that makes them entry points for one: `FUSED_CONV_KERNELS(conv1)` of fused/conv.cuh
makes conv1_forward and conv1_backward. The generated unit has these structs and macros alone.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

WIDTH = 100
"""Columns of the generated source."""

Constant = int | float | str
"""A size, a number or the name of an enumerator."""


class KernelSource(NamedTuple):
    """The kernels of one file for one layer, or for what all layers share."""

    label: str
    """The layer's name, with which the names of its kernels begin."""
    file: str
    constants: Mapping[str, Constant]
    """Name -> value of each size or number that the file asks the layer for."""

    @property
    def struct(self) -> str:
        """The layer as a C++ type."""
        floats = {k: f"{v!r}f" for k, v in self.constants.items() if isinstance(v, float)}
        others = {k: v for k, v in self.constants.items() if k not in floats}
        members = [declaration("int", others)] if others else []
        if floats:
            members.append(declaration("float", floats))
        return f"struct {self.label} {{\n" + "\n".join(members) + "\n};"

    @property
    def entry_points(self) -> str:
        """The macro that makes the file's kernels for the layer: named as the file is.

        For a file outside kernels/, whose whole path is given, that is its name without folders.
        """
        path = Path(self.file)
        name = path.name if path.is_absolute() else self.file
        macro = re.sub(r"\W", "_", name.removesuffix(".cuh")).upper()
        return f"{macro}_KERNELS({self.label})"


def declaration(kind: str, constants: Mapping[str, Constant]) -> str:
    """The declaration of a struct's constants of one type, in lines of WIDTH columns."""
    # A size and its value are one word to the wrapping of lines.
    values = ", ".join(f"{name}~=~{value}" for name, value in constants.items())
    text = textwrap.fill(
        f"static constexpr {kind} {values};",
        WIDTH,
        initial_indent="  ",
        subsequent_indent="      ",
        break_on_hyphens=False,
    )
    return text.replace("~", " ")


def translation_unit(parts: Sequence[KernelSource], programmatic: bool = False) -> str:
    """The source of all these kernels, which may be such as are launched programmatically."""
    files = dict.fromkeys(part.file for part in parts)
    head = ["#define PROGRAMMATIC_LAUNCH"] * programmatic
    texts = ["\n".join([*head, *(f'#include "{file}"' for file in files)])]
    texts += [f"{part.struct}\n{part.entry_points}" for part in parts]
    return "\n\n".join(texts) + "\n"
