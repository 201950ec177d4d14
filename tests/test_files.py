"""Files appear whole or not at all; damaged arrays are refused."""

import errno
import os
import pickle
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cnnlib.errors import DataError, UserError
from cnnlib.files import check_writable, in_turn, read_arrays, sha256, write_whole
from cnnlib.paths import ROOT
from tests.support.toys import read_only, small_disk

pytestmark = pytest.mark.quick


def left_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_success_replaces_the_file(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.csv"
    for text in ("old", "new"):
        with write_whole(target) as temporary:
            assert temporary.suffix == ".csv"
            assert temporary.parent == target.parent
            temporary.write_text(text)
    assert target.read_text() == "new"
    assert left_in(target.parent) == ["file.csv"]


def test_an_interrupt_between_two_calls_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = os.close

    def interrupted(handle: int) -> None:
        close(handle)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.close", interrupted)
        with pytest.raises(KeyboardInterrupt), write_whole(tmp_path / "file.csv"):
            pass
    assert left_in(tmp_path) == []


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with write_whole(tmp_path / "file") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(error), write_whole(tmp_path / "file") as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise error
    assert (tmp_path / "file").read_text() == "old"
    assert left_in(tmp_path) == ["file"]


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "file" / "inside", tmp_path / "folder", tmp_path / ("n" * 300)):
        with pytest.raises(UserError, match="cannot write .*") as raised:
            with write_whole(target) as temporary:
                temporary.write_text("x")
        assert str(target) in str(raised.value)
    assert left_in(tmp_path) == ["file", "folder"]


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Be a user to whom permissions apply: they do not to root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_folders_and_files_without_permission(tmp_path: Path, unprivileged: None) -> None:
    if os.getuid():  # pytest keeps root's folders from others already
        np.savez(tmp_path / "arrays.npz", x=1)
        (tmp_path / "arrays.npz").chmod(0)
        tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot write .*Permission denied"):
            with write_whole(tmp_path / "file"):
                pass
        with pytest.raises(DataError, match="cannot read data file .*Permission denied"):
            read_arrays(tmp_path / "arrays.npz", ["x"], "data file")
    finally:
        if os.getuid():
            tmp_path.chmod(0o700)


def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        a_full_disk(disk)


def a_full_disk(disk: Path) -> None:
    target = disk / "arrays.npz"
    with write_whole(target) as temporary:
        np.savez(temporary, x=np.arange(10))
    before = sha256(target)
    with pytest.raises(UserError, match=r"cannot write .*arrays\.npz: No space left"):
        with write_whole(target) as temporary, open(temporary, "wb") as out:
            np.savez(out, x=np.zeros(100_000))
    assert sha256(target) == before
    assert left_in(disk) == ["arrays.npz"]


# before the work ---------------------------------------------------------------------------------


def refused(*paths: Path, size: int = 1) -> str:
    with pytest.raises(UserError) as raised:
        check_writable(*paths, size=size)
    return str(raised.value)


def test_what_can_be_written_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("old.csv")
    before = (tmp_path / "old.csv").stat()
    paths = [tmp_path / name for name in ("old.csv", "link.csv", "new.csv", "deep/er/new.csv")]
    check_writable(*paths, size=3 << 20)
    assert left_in(tmp_path) == ["link.csv", "old.csv"]
    assert (tmp_path / "old.csv").stat() == before
    monkeypatch.chdir(tmp_path)
    check_writable(Path("new.csv"), Path("deep/new.csv"))
    assert left_in(tmp_path) == ["link.csv", "old.csv"]


def test_what_cannot_be_written_is_said_before(tmp_path: Path) -> None:
    """In the words of `write_whole`, whatever is in the way."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "nowhere").symlink_to("missing")
    os.mkfifo(tmp_path / "pipe")
    names = left_in(tmp_path)
    for name, why in (
        ("folder", "Is a directory"),
        ("file/inside", "Not a directory"),
        ("file/deep/inside", "Not a directory"),
        ("nowhere/inside", "nowhere is no folder"),
        ("pipe", "it is no regular file"),
        ("n" * 300, "File name too long"),
        ("n" * 250, "File name too long"),  # with what temporary names add to it
    ):
        path = tmp_path / name
        said = refused(tmp_path / "good", path)
        assert said.startswith(f"cannot write {path}: ")
        assert said.endswith(why)
        if "nowhere" not in name:
            with pytest.raises(UserError, match="cannot write"), write_whole(path):
                pass
    assert left_in(tmp_path) == names


def test_a_device_is_not_replaced_by_a_file() -> None:
    before = os.stat("/dev/null")
    assert refused(Path("/dev/null")) == "cannot write /dev/null: it is no regular file"
    with pytest.raises(UserError, match="it is no regular file"), write_whole("/dev/null"):
        pass
    assert os.stat("/dev/null").st_rdev == before.st_rdev


def test_permissions_are_tried_before(tmp_path: Path, unprivileged: None) -> None:
    if os.getuid():  # pytest keeps root's folders from others already
        (tmp_path / "locked").mkdir(mode=0o500)
    for name in ("locked/file", "locked/deep/file"):
        path = tmp_path / name
        assert refused(path) == f"cannot write {path}: Permission denied"


def test_a_read_only_disk_is_noticed_before(tmp_path: Path) -> None:
    with read_only(tmp_path / "kept") as folder:
        for path in (folder / "file", folder / "deep" / "file"):
            assert refused(path).endswith(("Read-only file system", "Permission denied"))


def test_a_disk_that_is_too_full_is_noticed_before(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as folder:
        check_writable(folder / "small", size=1 << 15)
        assert refused(folder / "large", size=1 << 17).endswith("No space left on device")
        (folder / "filler").write_bytes(bytes(64 << 10))
        assert refused(folder / "small", size=4096).endswith("No space left on device")
        assert refused(folder / "deep" / "small", size=4096).endswith("No space left on device")
        assert left_in(folder) == ["filler"]


def test_sha256_of_the_standard_example(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == expected


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    path = tmp_path / "arrays.npz"
    np.savez(path, x=np.arange(1000.0), name="someone")
    return path


def test_arrays_come_back(arrays: Path) -> None:
    read = read_arrays(arrays, ["x", "name"], "data file")
    assert read["name"].item() == "someone"
    np.testing.assert_array_equal(read["x"], np.arange(1000.0))


def test_a_missing_array_is_named(arrays: Path) -> None:
    with pytest.raises(DataError, match=r"arrays\.npz is no data file: it lacks y"):
        read_arrays(arrays, ["x", "y"], "data file")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read data file .*nothing\.npz: No such file"):
        read_arrays(tmp_path / "nothing.npz", ["x"], "data file")
    with pytest.raises(DataError, match="Is a directory"):
        read_arrays(tmp_path, ["x"], "data file")


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "foreign.npz"
    for content in (b"", b"PK", b"PK\x03\x04", b"hello\n" * 100, pickle.dumps({"x": 1})):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"foreign\.npz"):
            read_arrays(path, ["x"], "data file")
    with open(path, "wb") as out:
        np.save(out, np.zeros(3))
    with pytest.raises(DataError, match="holds one array"):
        read_arrays(path, ["x"], "data file")


class Executed:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, x=np.array([Executed(tmp_path / "made")], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"data file .*bad\.npz is damaged"):
        read_arrays(path, ["x"], "data file")
    assert not (tmp_path / "made").exists()


def test_every_truncation_and_flipped_data_is_noticed(arrays: Path) -> None:
    whole = arrays.read_bytes()
    for length in range(0, len(whole), 97):
        arrays.write_bytes(whole[:length])
        with pytest.raises(DataError, match="data file"):
            read_arrays(arrays, ["x", "name"], "data file")
    for position in range(200, 8000, 373):  # inside the numbers of x
        arrays.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DataError, match="is damaged"):
            read_arrays(arrays, ["x", "name"], "data file")


def test_an_array_too_large_for_any_memory(tmp_path: Path) -> None:
    """A header may promise what no machine has."""
    import io
    import zipfile

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)}
    )
    path = tmp_path / "vast.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    with pytest.raises(DataError, match="is damaged"):
        read_arrays(path, ["x"], "data file")


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    old, young = tmp_path / ".table.abcd1234.csv", tmp_path / ".table.efgh5678.csv"
    others = [tmp_path / ".tables.abcd1234.csv", tmp_path / "table.old.csv", tmp_path / ".a.csv"]
    for path in (old, young, *others):
        path.write_text("cut o")
    for path in (old, *others):
        os.utime(path, (0, 0))
    with write_whole(tmp_path / "table.csv") as temporary:
        temporary.write_text("whole")
    assert not old.exists()
    assert young.exists(), "another process may be writing it"
    assert all(path.exists() for path in others)


TURN = """
import sys, time
from pathlib import Path
from cnnlib.files import in_turn
with in_turn(Path(sys.argv[1])), open(sys.argv[2], "a", buffering=1) as log:
    log.write("in\\n")
    time.sleep(0.2)
    log.write("out\\n")
"""


def test_processes_and_threads_take_turns(tmp_path: Path) -> None:
    target, log = tmp_path / "folder" / "built", tmp_path / "log"
    command = [sys.executable, "-c", TURN, str(target), str(log)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]

    def work() -> None:
        with in_turn(target), open(log, "a", buffering=1) as stream:
            stream.write("in\n")
            time.sleep(0.05)
            stream.write("out\n")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert log.read_text().split() == ["in", "out"] * 6
    assert os.listdir(target.parent) == []


def test_a_killed_process_keeps_no_turn(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = TURN.replace("sleep(0.2)", "sleep(600)")
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "built"), str(log)], cwd=ROOT
    ) as process:
        while not log.exists() or not log.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    with in_turn(tmp_path / "built"):
        pass
    assert os.listdir(tmp_path) == ["log"]


def test_without_locks_there_is_no_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with in_turn(tmp_path / "built"), in_turn(tmp_path / "built"):
        pass
