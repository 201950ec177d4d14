"""IDX files: the array that a plain second decoder finds, or one line that says what is wrong."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cnnlib.datasets import read_idx, write_idx
from cnnlib.datasets.idx import MOST_DIMENSIONS
from tests.fuzz.support import CHANGES, Change, damaged, inputs, refusal

SIZES = st.sampled_from([0, 1, 2, 3, 28, 255, 256, 65535, 1 << 16, (1 << 31) - 1, (1 << 32) - 1])


def decoded(data: bytes) -> tuple[list[int], bytes] | None:
    """Sizes and elements by the letter of the format, without numpy; None if `data` is no such."""
    if len(data) < 4 or data[0] or data[1] or data[2] != 8 or not data[3]:
        return None
    begin = 4 + 4 * data[3]
    sizes = [int.from_bytes(data[i : i + 4], "big") for i in range(4, begin, 4)]
    if len(data) < begin or math.prod(sizes) != len(data) - begin:
        return None
    return sizes, data[begin:]


def check(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    found, said = refusal(lambda: read_idx(path))
    expected = decoded(data)
    if found is None:
        assert str(path) in str(said)
        # only what numpy cannot hold is refused though it is good
        assert (
            expected is None
            or len(expected[0]) > MOST_DIMENSIONS
            or math.prod(size or 1 for size in expected[0]) >= 1 << 63
        ), said
    else:
        assert expected is not None
        assert list(found.shape) == expected[0]
        assert found.tobytes() == expected[1]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("idx") / "images"


@inputs(1500)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    first=st.integers(0, 255),
    changes=CHANGES | st.just([]),
)
def test_damaged_files(path: Path, shape: list[int], first: int, changes: list[Change]) -> None:
    elements = (np.arange(math.prod(shape)) + first).astype(np.uint8).reshape(shape)
    write_idx(path, elements)
    check(path, damaged(path.read_bytes(), changes))


@inputs(1500)
@given(sizes=st.lists(SIZES, max_size=70), content=st.binary(max_size=40), more=st.integers(-1, 1))
@example(sizes=[1] * 255, content=b"x", more=0)  # numpy knows 64 dimensions
@example(sizes=[0] + [(1 << 32) - 1] * 3, content=b"", more=0)
def test_headers_that_promise_much(path: Path, sizes: list[int], content: bytes, more: int) -> None:
    header = struct.pack(f">HBB{len(sizes)}I", 0, 8, min(255, max(0, len(sizes))), *sizes)
    if math.prod(sizes) <= 1 << 16:
        content = bytes(max(0, math.prod(sizes) + more))
    check(path, header + content)


@inputs(500)
@given(data=st.binary(max_size=60))
def test_any_bytes(path: Path, data: bytes) -> None:
    check(path, data)
    check(path, b"\0\0\x08" + data)


def test_a_vast_file_of_another_kind_is_not_read(path: Path) -> None:
    """A sparse terabyte: refused by its beginning and its size, before memory is taken for it."""
    for beginning in (b"hello", struct.pack(">HBBI", 0, 8, 1, 5)):
        with open(path, "wb") as out:
            out.write(beginning)
            out.truncate(1 << 40)
        found, said = refusal(lambda: read_idx(path))
        assert found is None
        assert "is no IDX file" in str(said) or "is too long" in str(said)
    path.unlink()
