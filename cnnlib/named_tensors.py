"""Which tensors of a file or a state_dict are which parameters of a network."""

import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from cnnlib.errors import DataError
from cnnlib.layers import Array, Shape


def gather(
    wanted: Mapping[str, Shape], arrays: Mapping[str, Array], where: str, ordered: bool = True
) -> Array:
    """One flat float32 vector of the arrays that `match` finds for `wanted`, in that order.

    Raises DataError naming `where` and the tensor if there is none of that shape, or if its
    elements are no numbers or not finite.
    """
    shapes = {name: array.shape for name, array in arrays.items()}
    parts = []
    for name in match(wanted, shapes, where, ordered).values():
        array = arrays[name]
        if array.dtype.kind not in "fiu":
            raise DataError(f"{where}: tensor {name} has elements of type {array.dtype}")
        with np.errstate(over="ignore"):
            part = array.astype(np.float32).reshape(-1)
        if not np.isfinite(part).all():
            raise DataError(f"{where}: tensor {name} has elements that are not finite")
        parts.append(part)
    return np.concatenate([np.empty(0, np.float32), *parts])


def match(
    wanted: Mapping[str, Shape], found: Mapping[str, Shape], where: str, ordered: bool = True
) -> dict[str, str]:
    """For each name of `wanted` the name of its tensor in `found`.

    Tensors whose names are wanted are taken by name, and all others in the order in which they are
    listed; shapes must agree. With `ordered` false the order of `found` means nothing, as in a
    .safetensors file: tensors are then paired by their shapes, several of one shape by the numbers
    in their names. Raises DataError naming `where`, the tensor, the shape that it has and the one
    that is expected.
    """
    pairs = {name: name for name in wanted if name in found}
    rest = {name: shape for name, shape in wanted.items() if name not in pairs}
    others = {name: shape for name, shape in found.items() if name not in pairs}
    if rest and not ordered:
        others = _in_order(rest, others, where)
    pairs |= dict(zip(rest, others, strict=False))
    for name, other in pairs.items():
        if found[other] != wanted[name]:
            alias = "" if other == name else f" as {name}"
            raise DataError(
                f"{where}: tensor {other} has shape {found[other]}, expected {wanted[name]}{alias}"
            )
    if missing := list(rest)[len(others) :]:
        raise DataError(
            f"{where}: there is no tensor for {missing[0]} of shape {wanted[missing[0]]}; it has "
            f"{_listed(found)}"
        )
    if surplus := list(others)[len(rest) :]:
        raise DataError(
            f"{where}: tensor {surplus[0]} of shape {found[surplus[0]]} belongs to no layer; "
            f"expected are {_listed(wanted)}"
        )
    return {name: pairs[name] for name in wanted}


def _in_order(
    rest: Mapping[str, Shape], others: Mapping[str, Shape], where: str
) -> dict[str, Shape]:
    """`others` in the order of the tensors of `rest` that have the same shapes."""
    alike: defaultdict[tuple[Shape, str], list[str]] = defaultdict(list)
    for name in sorted(others, key=_numbers):
        alike[_kind(name, others[name])].append(name)
    for (shape, _), names in alike.items():
        if len({re.sub(r"\d+", "#", name) for name in names}) > 1:
            raise DataError(
                f"{where}: tensors {names[0]} and {names[1]} have the same shape, {shape}, and "
                f"nothing says which is first; name them as the network does: {_listed(rest)}"
            )
    partners = {}
    for name, shape in rest.items():
        if names := alike[_kind(name, shape)]:
            partners[name] = names.pop(0)
    left = [other for other in others if other not in partners.values()]
    for name in [name for name in rest if name not in partners]:
        # Their shapes are wrong. A weight's message should be about a weight.
        same = [other for other in left if other.rpartition(".")[2] == name.rpartition(".")[2]]
        if left:
            partners[name] = (same or left)[0]
            left.remove(partners[name])
    ordered = [partners[name] for name in rest if name in partners] + left
    return {name: others[name] for name in ordered}


def _kind(name: str, shape: Shape) -> tuple[Shape, str]:
    """Tensors of one kind are alike: the same shape, and weights or biases."""
    return shape, name.rpartition(".")[2]


def _numbers(name: str) -> list[str | int]:
    """A key that sorts layer10 behind layer9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _listed(tensors: Mapping[str, Shape], most: int = 12) -> str:
    names = [f"{name} {shape}" for name, shape in tensors.items()]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") or "none"
