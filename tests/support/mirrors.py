"""A web server of this machine that serves a small data set, well or badly, and its settings."""

import gzip
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from cnnlib.datasets import IdxSpec, write_idx

NAMES = ("train-images", "train-labels", "test-images", "test-labels")
ROLES = ("train_images", "train_labels", "test_images", "test_labels")
Answer = Callable[["Handler", bytes], None]


def arrays(train: int = 20, test: int = 10, side: int = 6, classes: int = 4) -> list[np.ndarray]:
    """Images and labels like those of four IDX files, in the order of NAMES."""
    generator = np.random.default_rng(7)
    return [
        array
        for count in (train, test)
        for array in (
            generator.integers(0, 256, (count, side, side), np.uint8),
            (np.arange(count) % classes).astype(np.uint8),
        )
    ]


def write_files(folder: Path, content: list[np.ndarray] | None = None) -> Path:
    """The four files in `folder`."""
    for name, array in zip(NAMES, content or arrays(), strict=True):
        write_idx(folder / name, array)
    return folder


def spec_of(folder: Path, mirrors: list[dict[str, str]], **changes: Any) -> IdxSpec:
    """Settings of the data set whose files lie in `folder`."""
    return IdxSpec.model_validate(
        {
            "kind": "idx",
            "shape": [1, 6, 6],
            "classes": 4,
            "files": {
                role: {
                    "name": name,
                    "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
                }
                for role, name in zip(ROLES, NAMES, strict=True)
            },
            "mirrors": mirrors,
            **changes,
        }
    )


class Handler(BaseHTTPRequestHandler):
    """GET /WAY/NAME.gz answers the file NAME in the way WAY: a key of WAYS."""

    server: "Server"

    def do_GET(self) -> None:
        _, way, name = self.path.split("/")
        self.server.asked.append(self.path)
        path = self.server.folder / name.removesuffix(".gz")
        content = path.read_bytes()
        WAYS[way](self, gzip.compress(content) if name.endswith(".gz") else content)

    def begin(self, length: int | None, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def stop(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.begin(len(body), status, **headers)
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def good(handler: Handler, body: bytes) -> None:
    handler.stop(body)


def not_found(handler: Handler, body: bytes) -> None:
    handler.stop(b"<html>no such thing</html>", 404)


def web_page(handler: Handler, body: bytes) -> None:
    handler.stop(b"<!DOCTYPE html><p>Please accept our terms", Content_Type="text/html")


def cut_off(handler: Handler, body: bytes) -> None:
    handler.begin(len(body))
    handler.wfile.write(body[: len(body) // 2])


def cut_off_without_length(handler: Handler, body: bytes) -> None:
    handler.begin(None)
    handler.wfile.write(body[: len(body) // 2])


def corrupt(handler: Handler, body: bytes) -> None:
    middle = len(body) // 2
    handler.stop(body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :])


def empty(handler: Handler, body: bytes) -> None:
    handler.stop(b"")


def other(handler: Handler, body: bytes) -> None:
    handler.stop(gzip.compress(gzip.decompress(body)[:-1] + b"!"))


def unzipped_on_the_way(handler: Handler, body: bytes) -> None:
    """As object stores do that keep a content encoding."""
    handler.stop(gzip.decompress(body))


def zipped_on_the_way(handler: Handler, body: bytes) -> None:
    handler.stop(gzip.compress(body), Content_Encoding="gzip")


def redirected(handler: Handler, body: bytes) -> None:
    handler.stop(b"", 302, Location=handler.path.replace("redirected", "good"))


def redirected_forever(handler: Handler, body: bytes) -> None:
    handler.stop(b"", 302, Location=handler.path)


def nonsense(handler: Handler, body: bytes) -> None:
    handler.wfile.write(b"220 ready for mail\r\n\r\n")


def late(handler: Handler, body: bytes) -> None:
    time.sleep(0.2)
    handler.stop(body)


def silent(handler: Handler, body: bytes) -> None:
    handler.server.ended.wait(20)


def stalled(handler: Handler, body: bytes) -> None:
    """Half of the answer, then nothing."""
    handler.begin(len(body))
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    handler.server.half_sent.set()
    handler.server.ended.wait(20)


def trickle(handler: Handler, body: bytes) -> None:
    """A byte now and then: never silent, never done."""
    handler.begin(len(body) + 10_000)
    began = time.monotonic()
    while time.monotonic() - began < 20 and not handler.server.ended.wait(0.02):
        handler.wfile.write(b"\x1f")
        handler.wfile.flush()


def only_train_images(handler: Handler, body: bytes) -> None:
    (good if "train-images" in handler.path else not_found)(handler, body)


def with_more_behind(handler: Handler, body: bytes) -> None:
    handler.stop(body + b"\r\n")


def padded(handler: Handler, body: bytes) -> None:
    handler.stop(body + bytes(2_000_000))


def in_members(handler: Handler, body: bytes) -> None:
    content = gzip.decompress(body)
    parts = (content[:5], b"", content[5:])
    handler.stop(b"".join(gzip.compress(part) for part in parts) + b"\0\0more")


def second_member_cut_off(handler: Handler, body: bytes) -> None:
    handler.stop(body + body[:-9])


def checksum_damaged(handler: Handler, body: bytes) -> None:
    handler.stop(body[:-8] + b"crc!" + body[-4:])


WAYS: dict[str, Answer] = {
    way.__name__: way
    for way in (
        good,
        not_found,
        web_page,
        cut_off,
        cut_off_without_length,
        corrupt,
        empty,
        other,
        unzipped_on_the_way,
        zipped_on_the_way,
        redirected,
        redirected_forever,
        nonsense,
        late,
        silent,
        stalled,
        trickle,
        only_train_images,
        with_more_behind,
        padded,
        in_members,
        second_member_cut_off,
        checksum_damaged,
    )
}


class Server(ThreadingHTTPServer):
    """Serves `folder` until its `with` block ends; `asked` are the paths asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked: list[str] = []
        self.half_sent = threading.Event()
        self.ended = threading.Event()

    def mirror(self, way: str) -> dict[str, str]:
        """The settings of a mirror that answers in this way."""
        return {"url": f"http://127.0.0.1:{self.server_port}/{way}/{{name}}.gz"}

    def handle_error(self, *_: object) -> None:
        """A client that gives up is what many of the tests are about."""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of the four files in `folder`."""
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()
