"""A small data set in every format that can be read, and its settings."""

import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from cnnlib.datasets import AnySpec, DatasetSpec
from tests.support.mirrors import NAMES, ROLES, arrays, write_files

SPEC: TypeAdapter[AnySpec] = TypeAdapter(DatasetSpec)
SHAPE, CLASSES = (3, 5, 4), 3
CLASS_NAMES = ("bird", "cat", "dog")


def colours(
    train: int = 18, test: int = 9, shape: tuple[int, int, int] = SHAPE
) -> dict[str, np.ndarray]:
    """Images (N, 3, 5, 4) and labels (N,); the class decides which channel is bright."""
    generator = np.random.default_rng(5)
    found = {}
    for part, count in (("train", train), ("test", test)):
        labels = (np.arange(count) % CLASSES).astype(np.uint8)
        images = generator.integers(0, 100, (count, *shape), np.uint8)
        images[np.arange(count), labels] += 100
        found |= {f"{part}_images": images, f"{part}_labels": labels}
    return found


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def settings(kind: str, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "shape": list(SHAPE), "classes": CLASSES} | more


def spec(kind: str, **more: Any) -> AnySpec:
    return SPEC.validate_python(settings(kind, **more))


def packed(files: dict[str, bytes], path: Path) -> Path:
    """A .zip or .tar.gz of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def cifar_bytes(images: np.ndarray, labels: np.ndarray, label_bytes: int = 1) -> bytes:
    """Records as in the binary version of CIFAR; only the last of several labels is right."""
    before = np.full((len(labels), label_bytes), 255, np.uint8)
    before[:, -1] = labels
    return np.concatenate([before, images.reshape(len(images), -1)], axis=1).tobytes()


def cifar(
    folder: Path,
    name: str = "cifar.tar.gz",
    label_bytes: int = 1,
    shape: tuple[int, int, int] = SHAPE,
) -> dict[str, Any]:
    """An archive as CIFAR-10 is published, in two batches; its settings."""
    found = colours(shape=shape)
    halves = [slice(0, 9), slice(9, 18)]
    files = {
        f"batches-bin/data_batch_{i}.bin": cifar_bytes(
            found["train_images"][part], found["train_labels"][part], label_bytes
        )
        for i, part in enumerate(halves, 1)
    }
    files["batches-bin/readme.html"] = b"<html>"
    files["batches-bin/test_batch.bin"] = cifar_bytes(
        found["test_images"], found["test_labels"], label_bytes
    )
    path = packed(files, folder / name)
    return settings(
        "cifar",
        archive={"name": name, "sha256": sha(path)},
        files={
            "train": ["batches-bin/data_batch_1.bin", "batches-bin/data_batch_2.bin"],
            "test": ["batches-bin/test_batch.bin"],
        },
        label_bytes=label_bytes,
        shape=list(shape),
        mirrors=[{"folder": str(folder)}],
    )


def emnist(folder: Path) -> dict[str, Any]:
    """A gzip.zip of gzipped IDX files as EMNIST is published: transposed, with labels from 1."""
    content = arrays(side=6)
    plain = write_files(folder / "plain", [*_transposed(content)])
    files = {
        f"gzip/emnist-{name}-ubyte.gz": gzip.compress((plain / name).read_bytes(), mtime=0)
        for name in NAMES
    }
    path = packed(files, folder / "gzip.zip")
    return {
        "kind": "idx",
        "shape": [1, 6, 6],
        "classes": 4,
        "transpose": True,
        "first_label": 1,
        "archive": {"name": "gzip.zip", "sha256": sha(path)},
        "files": {
            role: f"gzip/emnist-{name}-ubyte.gz" for role, name in zip(ROLES, NAMES, strict=True)
        },
        "mirrors": [{"folder": str(folder)}],
    }


def _transposed(content: list[np.ndarray]) -> list[np.ndarray]:
    train_images, train_labels, test_images, test_labels = content
    return [
        train_images.transpose(0, 2, 1),
        train_labels + np.uint8(1),
        test_images.transpose(0, 2, 1),
        test_labels + np.uint8(1),
    ]


def npz(folder: Path, **changes: np.ndarray | None) -> dict[str, Any]:
    """One .npz file with the images channels last, as Keras keeps them; its settings."""
    found: dict[str, np.ndarray | None] = {
        "x_train": colours()["train_images"].transpose(0, 2, 3, 1),
        "y_train": colours()["train_labels"].astype(np.int64)[:, None],
        "x_test": colours()["test_images"].transpose(0, 2, 3, 1),
        "y_test": colours()["test_labels"].astype(np.int64)[:, None],
    }
    kept = {key: value for key, value in (found | changes).items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "mine.npz", **kept)
    return settings(
        "npz",
        files=[{"name": "mine.npz", "sha256": sha(folder / "mine.npz")}],
        arrays={
            "train_images": "x_train",
            "train_labels": "y_train",
            "test_images": "x_test",
            "test_labels": "y_test",
        },
        mirrors=[{"folder": str(folder)}],
    )


def pictures(folder: Path, suffix: str = "png") -> dict[str, Any]:
    """Folders train/CLASS and test/CLASS; the settings."""
    found = colours()
    for part in ("train", "test"):
        for index, label in enumerate(found[f"{part}_labels"]):
            path = folder / part / CLASS_NAMES[label] / f"{index:03}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(found[f"{part}_images"][index].transpose(1, 2, 0)).save(path)
    return settings("folder", path=str(folder))
