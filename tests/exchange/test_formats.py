"""Files of weights: what they hold, what is read from files of others, and what is refused."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cnnlib.errors import DataError, UserError
from cnnlib.exchange.formats import FORMATS, load_weights, save_weights
from cnnlib.exchange.weights import Weights
from cnnlib.files import read_arrays
from cnnlib.network import Network, parse_layers

pytestmark = pytest.mark.quick

LAYERS = [
    {"conv": {"maps": 2, "kernel": 3}},
    {"activation": "relu"},
    {"subsample": 2},
    {"dense": 3},
]


def network(channels: int = 1) -> Network:
    return Network("toy", (channels, 8, 8), 3, parse_layers("toy", LAYERS))


def weights(channels: int = 1) -> Weights:
    built = network(channels)
    mean = (10.0, 20.5)[:channels] if channels > 1 else 33.25
    deviation = (3.0, 4.0)[:channels] if channels > 1 else 70.0
    return Weights(
        built,
        built.initial_parameters(3),
        mean,
        deviation,
        {"dataset": "toys"},
        ("cat", "dog", "Käse"),
        17,
    )


def same(one: Weights, two: Weights) -> None:
    np.testing.assert_array_equal(one.parameters, two.parameters)
    for name in ("network", "mean", "deviation", "origin", "class_names", "steps", "version"):
        assert getattr(one, name) == getattr(two, name), name


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_file_alone_is_enough(tmp_path: Path, ending: str, channels: int) -> None:
    path, given = tmp_path / f"w{ending}", weights(channels)
    save_weights(path, given)
    same(load_weights(path), given)
    before = path.read_bytes()
    save_weights(path, load_weights(path))
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_other_programs_read_the_tensors_by_name(tmp_path: Path) -> None:
    given = weights()
    save_weights(tmp_path / "w.safetensors", given)
    tensors = load_file(tmp_path / "w.safetensors")
    assert {name: array.shape for name, array in tensors.items()} == {
        "conv1.weight": (2, 1, 3, 3),
        "conv1.bias": (2,),
        "dense1.weight": (3, 18),
        "dense1.bias": (3,),
    }
    np.testing.assert_array_equal(tensors["dense1.bias"], given.parameters[-3:])


def test_files_of_version_0_1(tmp_path: Path) -> None:
    given, path = weights(), tmp_path / "old.npz"
    save_weights(path, given)
    with np.load(path) as saved:
        old = {k: v for k, v in saved.items() if k not in ("class_names", "steps", "version")}
    np.savez(path, **old)
    found = load_weights(path)
    np.testing.assert_array_equal(found.parameters, given.parameters)
    assert (found.class_names, found.steps, found.version) == ((), 0, "")
    assert found.network == given.network
    # ... under whatever name: earlier versions wrote .npz files only
    path.rename(tmp_path / "old")
    assert load_weights(tmp_path / "old").network == given.network


def foreign(tmp_path: Path, **changes: np.ndarray | None) -> Path:
    """A file of tensors as another program would write it."""
    given = weights().tensors
    tensors = {
        "c.weight": given["conv1.weight"],
        "c.bias": given["conv1.bias"],
        "head.weight": given["dense1.weight"],
        "head.bias": given["dense1.bias"],
    } | {name.replace("_", "."): array for name, array in changes.items()}
    path = tmp_path / "foreign.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items() if v is not None}, path)
    return path


def test_tensors_of_another_program(tmp_path: Path) -> None:
    found = load_weights(foreign(tmp_path), network(), 1.0, 2.0)
    np.testing.assert_array_equal(found.parameters, weights().parameters)
    assert (found.mean, found.deviation, found.version) == (1.0, 2.0, "")


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_tensors_of_another_precision(tmp_path: Path, dtype: type) -> None:
    given = weights().tensors["dense1.bias"].astype(dtype) + dtype(0.5)
    found = load_weights(foreign(tmp_path, head_bias=given), network(), 0.0, 1.0)
    np.testing.assert_array_equal(found.tensors["dense1.bias"], given.astype(np.float32))


def test_bfloat16(tmp_path: Path) -> None:
    """The tensor is written by hand, because numpy has no such type."""
    path, values = tmp_path / "b.safetensors", np.array([1.5, -2.0, 0.0078125], np.float32)
    halves = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = json.dumps(
        {"d.bias": {"dtype": "BF16", "shape": [3], "data_offsets": [0, len(halves)]}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + halves)
    from cnnlib.exchange import safetensors_file

    np.testing.assert_array_equal(safetensors_file.read(path).arrays["d.bias"], values)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"head_weight": np.zeros((18, 3), np.float32)},
            "tensor head.weight has shape (18, 3), expected (3, 18) as dense1.weight",
        ),
        ({"head_bias": None}, "there is no tensor for dense1.bias of shape (3,)"),
        (
            {"bn_running_mean": np.zeros(2, np.float32)},
            "tensor bn.running.mean of shape (2,) belongs to no layer",
        ),
        (
            {"head_bias": np.array([1, 2, np.inf], np.float32)},
            "head.bias has elements that are not",
        ),
        ({"head_bias": np.array([1, 2, 1e300])}, "head.bias has elements that are not finite"),
        ({"head_bias": np.ones(3, bool)}, "head.bias has elements of type bool"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, changes: dict[str, np.ndarray | None], problem: str
) -> None:
    path = foreign(tmp_path, **changes)
    with pytest.raises(DataError) as error:
        load_weights(path, network(), 0.0, 1.0)
    assert problem in str(error.value)
    assert str(error.value).startswith(f"weights file {path}, for network 'toy': ")


def test_what_a_file_does_not_say_must_be_given(tmp_path: Path) -> None:
    path = foreign(tmp_path)
    with pytest.raises(DataError, match="holds tensors, but does not say of what network"):
        load_weights(path, None, 0.0, 1.0)
    with pytest.raises(DataError, match="does not say how images are normalised"):
        load_weights(path, network())


def test_another_network_must_fit(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.npz", weights())
    tanh = [{"activation": "tanh"} if "activation" in layer else layer for layer in LAYERS]
    other = Network("other", (1, 8, 8), 3, parse_layers("other", tanh))
    found = load_weights(tmp_path / "w.npz", other)
    assert found.network == other
    np.testing.assert_array_equal(found.parameters, weights().parameters)
    assert (found.mean, found.class_names) == (33.25, weights().class_names)
    larger = Network("larger", (1, 9, 9), 3, parse_layers("larger", LAYERS[:-2] + LAYERS[-1:]))
    with pytest.raises(DataError, match=r"dense1.weight has shape \(3, 18\), expected \(3, 98\)"):
        load_weights(tmp_path / "w.npz", larger)


@pytest.mark.parametrize("ending", FORMATS)
def test_damaged_files(tmp_path: Path, ending: str) -> None:
    if ending in (".pt", ".pth"):
        pytest.importorskip("torch", reason="PyTorch is not installed")
    path = tmp_path / f"w{ending}"
    save_weights(path, weights())
    whole = path.read_bytes()
    contents = [b"", b"hello", whole[: len(whole) // 2], whole[:-1], b"\xff" * 500, whole[5:]]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"(?s)weights file {path}.* is damaged") as error:
            load_weights(path)
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(DataError, match=f"cannot read weights file {path}: No such file"):
        load_weights(path)
    path.mkdir()
    with pytest.raises(DataError, match=f"cannot read weights file {path}: Is a directory"):
        load_weights(path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layers": [{"dense": 4}]}, "ends in shape (4,)"),
        ({"layers": [{"bogus": 4}]}, "unknown layer kind 'bogus'"),
        ({"input_shape": [8, 8]}, "its metadata.input_shape"),
        ({"classes": -3}, "its metadata.classes"),
        ({"mean": "x"}, "its metadata.mean"),
        ({"mean": [1.0, 2.0]}, "mean has 2 numbers for 1 channels"),
        ({"deviation": 0.0}, "the deviation is 0.0"),
        ({"class_names": ["a"]}, "it names 1 of 3 classes"),
        ({"steps": -1}, "its metadata.steps"),
        ({"layers": [*LAYERS[:1], {"dense": 3}]}, "dense1.weight has shape (3, 18)"),
    ],
)
def test_metadata_that_contradict_the_tensors(
    tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, weights())
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    kept = json.loads(header["__metadata__"]["cnnlib"])
    header["__metadata__"]["cnnlib"] = json.dumps(kept | changes)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
    with pytest.raises(DataError) as error:
        load_weights(path)
    assert problem in str(error.value)
    assert f"weights file {path}" in str(error.value)


def test_unknown_endings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="end in one of .safetensors, .npz"):
        save_weights(tmp_path / "w.h5", weights())
    (tmp_path / "w.h5").write_bytes(b"\x89HDF")
    with pytest.raises(UserError, match="end in one of .safetensors, .npz"):
        load_weights(tmp_path / "w.h5")
    assert [each.name for each in tmp_path.iterdir()] == ["w.h5"]


def test_an_npz_file_is_read_by_numpy_alone(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.npz", weights())
    arrays = read_arrays(tmp_path / "w.npz", ["parameters", "layers"], "weights file")
    assert arrays["parameters"].shape == (network().parameter_count,)
    assert json.loads(arrays["layers"].item())[-1] == {"dense": {"units": 3}}
