"""Guesses the config entry of a data set from its files: kind, shape, classes and checksums."""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnlib.datasets.folder import checksum, find_classes
from cnnlib.datasets.http import FileFailed
from cnnlib.datasets.idx import parse_idx
from cnnlib.datasets.packed import (
    chunks,
    chunks_of,
    collected,
    is_archive,
    member_names,
    members,
    unzipped,
)
from cnnlib.errors import DataError, UserError
from cnnlib.files import arrays_in, sha256

Entry = dict[str, Any]
IDX = b"\0\0\x08"
TEST = re.compile(r"t10k|test|val", re.IGNORECASE)
LABELS = re.compile(r"label|target|class|(^|[^a-z])y([^a-z]|$)", re.IGNORECASE)
CIFAR_SHAPE = (3, 32, 32)


def describe(paths: Sequence[Path], only: str = "") -> Entry:
    """The entry of the data set that these files make, as config.yaml has it.

    `paths` are the four IDX files, .npz files, files of records as CIFAR has them, an archive of
    such files, or a folder of pictures. Of an archive only members count whose names contain
    `only`. Raises UserError naming what cannot be guessed, and DataError for what cannot be read.
    """
    if not paths:
        raise UserError("no file is given")
    if len(paths) == 1 and paths[0].is_dir():
        return _pictures(paths[0])
    try:
        if len(paths) == 1 and is_archive(paths[0]):
            return _archive(paths[0], only)
        found = {str(path): collected(chunks_of(path, unzip=False)) for path in paths}
    except FileFailed as failure:
        raise DataError(f"{paths[0]}: {failure}") from None
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename or paths[0]}: {error.strerror or error}"
        ) from None
    entry = _files(found, sums=True)
    return entry | {"mirrors": [{"folder": str(paths[0].parent)}]}


def _archive(path: Path, only: str) -> Entry:
    names = [name for name in member_names(path) if only in name]
    idx_or_records = re.compile(r"(ubyte|\.bin|\.npz|idx\d)(\.gz)?$")
    wanted = [name for name in names if idx_or_records.search(name)]
    idx = [name for name in wanted if "idx" in name]
    if not wanted or len(idx) > 4:
        what = "no IDX, .bin or .npz file" if not wanted else f"{len(idx)} IDX files, not four"
        raise UserError(
            f"{path} holds {what}{f' whose name contains {only!r}' if only else ''}; --only TEXT "
            f"chooses by a part of the name among: {_few(member_names(path))}"
        )
    found = {name: collected(chunks(stream)) for name, stream in members(path, wanted)}
    entry = _files(found, sums=False)
    archive = {"name": path.name, "sha256": sha256(path)}
    return entry | {"mirrors": [{"folder": str(path.parent)}], "archive": archive}


def _files(found: dict[str, bytearray], sums: bool) -> Entry:
    """The entry of files by their names and bytes; `sums`: each has a checksum of its own."""

    def file(name: str) -> Entry | str:
        if not sums:
            return name
        return {"name": Path(name).name, "sha256": hashlib.sha256(found[name]).hexdigest()}

    if empty := next((name for name, data in found.items() if not data), ""):
        raise DataError(f"{empty} is empty")
    plain = {name: _plain(name, data) for name, data in found.items()}
    if all(data.startswith(IDX) for data in plain.values()):
        return _idx(plain, file)
    if all(data.startswith(b"PK") for data in plain.values()):
        return _npz(plain, file)
    if all(name.endswith(".bin") for name in found):
        return _cifar(plain, file)
    other = next(name for name, data in plain.items() if not data.startswith(IDX))
    raise UserError(
        f"{other} is no IDX file, no .npz and no .bin of records: the kinds are four IDX files, "
        ".npz files, files of records, an archive of such files, and a folder with train/CLASS and "
        "test/CLASS"
    )


def _plain(name: str, data: bytearray) -> bytearray:
    if data.startswith(b"\x1f\x8b"):
        try:
            return collected(unzipped(io.BytesIO(data)))
        except FileFailed as failure:
            raise DataError(f"{name}: {failure}") from None
    return data


def _idx(found: dict[str, bytearray], file: Any) -> Entry:
    roles: dict[str, str] = {}
    arrays = {name: parse_idx(data, name) for name, data in found.items()}
    for name, array in arrays.items():
        part = "test" if TEST.search(Path(name).name) else "train"
        role = f"{part}_{'labels' if array.ndim == 1 else 'images'}"
        if role in roles:
            raise UserError(f"{roles[role]} and {name} both look like {role}")
        roles[role] = name
    wanted = ("train_images", "train_labels", "test_images", "test_labels")
    if lacking := [role for role in wanted if role not in roles]:
        raise UserError(f"none of {_few(found)} looks like {lacking[0]}: a set has four")
    images = arrays[roles["train_images"]]
    shape = images.shape[1:] if images.ndim == 4 else (1, *images.shape[1:])
    labels = [arrays[roles[role]] for role in ("train_labels", "test_labels")]
    entry = _common("idx", shape, labels)
    if any("emnist" in name for name in found):
        entry["transpose"] = True  # as its files are published
    return entry | {"files": {role: file(roles[role]) for role in wanted}}


def _npz(found: dict[str, bytearray], file: Any) -> Entry:
    arrays: dict[tuple[str, str], NDArray[Any]] = {}
    for name, data in found.items():
        for key, array in arrays_in(io.BytesIO(data), name, None, "an .npz file").items():
            arrays[name, key] = array
    roles: dict[str, tuple[str, str]] = {}
    for place, array in arrays.items():
        words = f"{Path(place[0]).stem} {place[1]}" if len(found) > 1 else place[1]
        part = "test" if TEST.search(words) else "train"
        what = "labels" if LABELS.search(words) or array.ndim == 1 else "images"
        roles.setdefault(f"{part}_{what}", place)
    wanted = ("train_images", "train_labels", "test_images", "test_labels")
    if lacking := [role for role in wanted if role not in roles]:
        known = ", ".join(f"{key} {array.shape}" for (_, key), array in arrays.items())
        raise UserError(
            f"no array looks like {lacking[0]}; found: {known or 'none'}. Name them by `arrays`"
        )
    images = arrays[roles["train_images"]]
    shape, layout = _layout(images)
    entry = _common("npz", shape, [arrays[roles[r]] for r in ("train_labels", "test_labels")])
    if layout:
        entry["layout"] = layout
    if images.dtype.kind in "fb":
        entry["range"] = _range(images)
    keys = [key for _, key in roles.values()]
    several = len(set(keys)) < len(keys)
    return entry | {
        "files": [file(name) for name in found],
        "arrays": {
            role: {"file": Path(roles[role][0]).name, "array": roles[role][1]}
            if several
            else roles[role][1]
            for role in wanted
        },
    }


def _layout(images: NDArray[Any]) -> tuple[tuple[int, ...], str]:
    """(shape, layout) of an array of images; the layout is "" where its sizes leave no doubt."""
    sizes = images.shape[1:]
    if len(sizes) == 2:
        return (1, *sizes), ""
    if len(sizes) == 3:
        first, last = sizes[0] in (1, 3), sizes[2] in (1, 3)
        if last and not first:
            return (sizes[2], *sizes[:2]), ""
        return sizes, "NCHW" if first and last else ""
    raise UserError(f"images of sizes {sizes}: give `shape` and `layout` by hand")


def _range(images: NDArray[Any]) -> list[float]:
    low, high = float(images.min()), float(images.max())
    for limits in ([0, 1], [-1, 1], [0, 255]):
        if limits[0] <= low and high <= limits[1]:
            return list(map(float, limits))
    return [low, high]


def _cifar(found: dict[str, bytearray], file: Any) -> Entry:
    size = int(np.prod(CIFAR_SHAPE))
    fits = [n for n in (1, 2) if all(len(data) % (size + n) == 0 for data in found.values())]
    if not fits:
        raise UserError(
            f"{_few(found)}: their sizes are no whole number of records of a label and an image of "
            f"{CIFAR_SHAPE}; write the entry by hand, with `shape` and `label_bytes`"
        )
    record = size + fits[0]
    labels = [np.frombuffer(data, np.uint8)[fits[0] - 1 :: record] for data in found.values()]
    entry = _common("cifar", CIFAR_SHAPE, labels)
    if fits[0] > 1:
        entry["label_bytes"] = fits[0]
    parts: dict[str, list[Any]] = {"train": [], "test": []}
    for name in sorted(found):
        parts["test" if TEST.search(Path(name).name) else "train"].append(file(name))
    if empty := [part for part, files in parts.items() if not files]:
        raise UserError(f"none of {_few(found)} looks like a file of {empty[0]} images")
    return entry | {"files": parts}


def _pictures(folder: Path) -> Entry:
    from PIL import Image

    parts = {part: find_classes(folder / part) for part in ("train", "test")}
    sizes: Counter[tuple[int, int]] = Counter()
    grey = True
    for classes in parts.values():
        for path in (path for paths in classes.values() for path in paths):
            try:
                with Image.open(path) as picture:
                    sizes[picture.size] += 1
                    grey &= picture.mode in ("1", "L", "LA", "I;16", "I", "F")
            except OSError as error:
                raise DataError(f"{path} is no picture: {error}") from None
    ((width, height), _), *others = sizes.most_common()
    names = sorted(parts["train"])
    entry: Entry = {
        "kind": "folder",
        "shape": [1 if grey else 3, height, width],
        "classes": len(names),
        "path": str(folder),
    }
    if others:
        entry["resize"] = "crop"
    return entry | {"sha256": checksum(folder, ("train", "test"))}


def _common(kind: str, shape: Iterable[int], labels: Sequence[NDArray[Any]]) -> Entry:
    """Kind, shape, classes and the first label."""
    values = np.concatenate([array.reshape(-1) for array in labels])
    if not values.size or values.dtype.kind not in "ui":
        what = values.dtype if values.size else "none"
        raise UserError(f"the labels are {what}, not whole numbers")
    first = int(values.min())
    entry: Entry = {"kind": kind, "shape": [int(size) for size in shape]}
    entry["classes"] = int(values.max()) - first + 1
    if first:
        entry["first_label"] = first
    return entry


def _few(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
