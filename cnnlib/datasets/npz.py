"""Images and labels from arrays of .npz files, in the layouts that people keep them in."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnlib.datasets.specs import NpzSpec
from cnnlib.errors import DataError

Bytes = NDArray[np.uint8]
Array = NDArray[Any]


def images_of(array: Array, spec: NpzSpec, where: str) -> Bytes:
    """(N, C, H, W) bytes of an array of images; DataError that begins with `where`."""
    return _as_bytes(_as_maps(array, spec, where), spec, where)


def _as_maps(array: Array, spec: NpzSpec, where: str) -> Array:
    """The array with axes N, C, H, W."""
    channels, height, width = spec.shape
    sizes = {
        "NHW": (height, width) if channels == 1 else None,
        "NCHW": (channels, height, width),
        "NHWC": (height, width, channels),
        "flat": (channels * height * width,),
    }
    fits = [name for name, size in sizes.items() if array.ndim and array.shape[1:] == size]
    if spec.layout is not None:
        fits = [spec.layout] if spec.layout in fits else []
    if not fits:
        what = f"layout {spec.layout}" if spec.layout else "any layout"
        raise DataError(
            f"{where} has sizes {_sizes(array.shape)}: not those of images of {spec.shape} in "
            f"{what}, such as {_sizes(('N', *(sizes[spec.layout or 'NCHW'] or ('H', 'W'))))}"
        )
    if len(fits) > 1:
        raise DataError(
            f"{where} has sizes {_sizes(array.shape)}, which fit {' and '.join(fits)}: say which "
            "one it is by `layout`"
        )
    if fits == ["NHWC"]:
        return array.transpose(0, 3, 1, 2)
    return array.reshape(len(array), *spec.shape)


def _as_bytes(maps: Array, spec: NpzSpec, where: str) -> Bytes:
    """Pixels as bytes; DataError for those that are none, with the image."""
    if maps.dtype == np.uint8 and spec.range is None:
        return np.ascontiguousarray(maps, np.uint8)
    if maps.dtype.kind not in "uifb" or (maps.dtype.kind in "fb" and spec.range is None):
        hint = "; give `range: [lowest, highest]` of them" if maps.dtype.kind in "fb" else ""
        raise DataError(f"{where} holds pixels of type {maps.dtype}, not bytes{hint}")
    low, high = spec.range if spec.range is not None else (0, 255)
    inside = (maps >= low) & (maps <= high)
    if not inside.all():  # nan is not inside either
        index = np.unravel_index(int(np.argmin(inside)), maps.shape)
        why = "outside of `range`" if spec.range else "no byte; give `range: [lowest, highest]`"
        raise DataError(f"{where}: a pixel of image {index[0]} is {maps[index]}, {why}")
    if spec.range is None:
        return np.ascontiguousarray(maps, np.uint8)
    found = np.empty(maps.shape, np.uint8)
    for target, image in zip(found, maps, strict=True):  # without a float copy of all
        target[...] = np.rint((image.astype(np.float64) - low) * (255 / (high - low)))
    return found


def labels_of(array: Array, where: str) -> NDArray[np.integer]:
    """(N,) whole numbers of an array (N,) or (N, 1); DataError that begins with `where`."""
    if array.dtype.kind not in "ui":
        raise DataError(f"{where} holds {array.dtype}: labels are whole numbers")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(f"{where} has sizes {_sizes(array.shape)}: labels have (N,) or (N, 1)")
    return array


def _sizes(shape: tuple[object, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def named(spec: NpzSpec, role: str) -> tuple[list[str], str]:
    """(names of the files that may hold the array of `role`, its name)."""
    found = getattr(spec.arrays, role)
    if isinstance(found, str):
        return [file.name for file in spec.files], found
    return [found.file], found.array
