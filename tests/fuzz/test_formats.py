"""Archives, .npz files and records of CIFAR: read as they were written, or one line."""

import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnlib.datasets.contents import Contents
from cnnlib.datasets.describe import describe
from cnnlib.datasets.reading import read
from tests.fuzz.support import CHANGES, Change, damaged, inputs, refusal
from tests.support import formats
from tests.support.formats import SPEC, colours, sha

Make = dict[str, tuple[Any, str]]
MADE: Make = {
    "npz": (formats.npz, "mine.npz"),
    "tar": (formats.cifar, "cifar.tar.gz"),
    "zip": (lambda folder: formats.cifar(folder, "cifar.zip"), "cifar.zip"),
    "emnist": (formats.emnist, "gzip.zip"),
}


@pytest.fixture(scope="module", params=MADE)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], bytes]:
    make, name = MADE[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    settings = make(folder)
    return folder / name, settings, (folder / name).read_bytes()


@inputs(250)
@given(changes=CHANGES)
def test_damaged_files(case: tuple[Path, dict[str, Any], bytes], changes: list[Change]) -> None:
    """The checksum is that of the damaged file: it was published so."""
    path, settings, whole = case
    path.write_bytes(damaged(whole, changes))
    settings = dict(settings)
    if "archive" in settings:
        settings["archive"] = {"name": path.name, "sha256": sha(path)}
    else:
        settings["files"] = [{"name": path.name, "sha256": sha(path)}]
    spec = SPEC.validate_python(settings)
    found, said = refusal(lambda: read("mine", spec, path.parent))
    if found is None:
        assert path.name in str(said)
    else:
        for part in (found.train, found.test):
            assert part.images.shape[1:] == spec.shape
            assert part.images.dtype == part.labels.dtype == np.uint8
            assert len(part.images) == len(part.labels) > 0
            assert part.labels.max() < spec.classes
    refusal(lambda: describe([path]))


@inputs(150)
@given(data=st.binary(max_size=80), start=st.sampled_from([b"", b"PK\3\4", b"\x1f\x8b\x08"]))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "anything.zip"
    path.write_bytes(start + data)
    found, said = refusal(lambda: describe([path]))
    assert found is not None or "anything.zip" in str(said)


@inputs(60)
@given(
    names=st.lists(
        st.sampled_from(["b/train.bin", "../b/train.bin", "/b/train.bin", "b/./train.bin", "b"]),
        max_size=6,
    )
)
@pytest.mark.parametrize("zipped", [False, True])
def test_only_members_of_the_right_name_count(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], zipped: bool
) -> None:
    """Nothing is written, whatever the names in an archive are."""
    folder = tmp_path_factory.mktemp("names")
    content = formats.cifar_bytes(colours()["train_images"], colours()["train_labels"])
    path = folder / ("a.zip" if zipped else "a.tar.gz")
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for name in dict.fromkeys(names):
                archive.writestr(name, content)
            archive.writestr("b/test.bin", content)
    else:
        formats.packed(dict.fromkeys([*names, "b/test.bin"], content), path)
        assert tarfile.is_tarfile(path)
    spec = SPEC.validate_python(
        formats.settings(
            "cifar",
            archive={"name": path.name, "sha256": sha(path)},
            files={"train": ["b/train.bin"], "test": ["b/test.bin"]},
        )
    )
    found, said = refusal(lambda: Contents("mine", spec, folder))
    assert (found is not None) == ("b/train.bin" in names)
    assert found is not None or "lacks b/train.bin" in str(said)
    assert [entry.name for entry in folder.iterdir()] == [path.name]
