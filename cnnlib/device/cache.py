"""Compiled code on disk, under a key made from the content that it was compiled from."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from cnnlib.device.cache_folder import REMEDY, cache_folder
from cnnlib.errors import DeviceError, UserError
from cnnlib.files import in_turn, write_whole
from cnnlib.paths import KERNELS

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)
_MARK = b"\ncnnlib sha256 "


def kernels_folder() -> Path:
    """The folder of kernel sources, an include path of every compiler: $CNNLIB_KERNELS if set."""
    chosen = os.environ.get("CNNLIB_KERNELS")
    return Path(chosen).resolve() if chosen else KERNELS


def included_files(*sources: str) -> list[Path]:
    """The kernel files that these sources include, directly or not, in a fixed order.

    All names in quotes count, whatever #if surrounds them; files outside the folder of kernels are
    the compiler's own. So an edit of a kernel rebuilds only the code that it is part of.
    """
    folder = kernels_folder()
    found: dict[Path, None] = {}
    texts = [(folder, source) for source in sources]
    while texts:
        beside, text = texts.pop()
        for name in _INCLUDE.findall(text):
            paths = (Path(os.path.normpath(place / name)) for place in (beside, folder))
            path = next((path for path in paths if path.is_file()), None)
            if path is not None and path not in found:
                found[path] = None
                texts.append((path.parent, path.read_text(encoding="utf-8")))
    return sorted(found)


def content_key(parts: Iterable[str | bytes], files: Iterable[Path] = ()) -> str:
    """A key for the result of compiling these texts and files: 40 hexadecimal digits."""
    digest = hashlib.sha256()

    def add(data: bytes) -> None:
        digest.update(str(len(data)).encode() + b":" + data)

    for part in parts:
        add(part.encode() if isinstance(part, str) else part)
    for path in files:
        add(path.name.encode())
        add(path.read_bytes())
    return digest.hexdigest()[:40]


def cached(key: str, suffix: str, build: Callable[[Path], None]) -> Path:
    """The file made by `build(path)`, kept under `key`.

    A digest follows the content, so that a damaged entry is noticed and built again; a loader of
    shared libraries does not read that far. One process builds and the others wait for it. Where
    the folder's file system has no locks several may build; each renames a whole file into place,
    and all of them are equally good.
    """
    target = cache_folder() / f"{key}{suffix}"
    if not _is_whole(target):
        with in_turn(target):
            if not _is_whole(target):
                _build(target, build)
    return target


def _build(target: Path, build: Callable[[Path], None]) -> None:
    try:
        with write_whole(target) as path:
            build(path)
            content = path.read_bytes()
            with open(path, "ab") as stream:
                stream.write(_MARK + hashlib.sha256(content).hexdigest().encode())
    except DeviceError:
        raise
    except UserError as error:
        raise DeviceError(f"{error}; {REMEDY}") from error


def content_of(path: Path) -> bytes:
    """The bytes that `build` wrote to a cached file, without the digest."""
    return path.read_bytes()[: -len(_MARK) - 64]


def whole_content(key: str, suffix: str) -> bytes | None:
    """The content kept under `key`; None where there is none, or it is damaged."""
    return _whole(cache_folder() / f"{key}{suffix}")


def _is_whole(path: Path) -> bool:
    return _whole(path) is not None


def _whole(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content, mark, digest = (
        data[: -len(_MARK) - 64],
        data[-len(_MARK) - 64 : -64],
        data[-64:],
    )
    whole = mark == _MARK and hashlib.sha256(content).hexdigest().encode() == digest
    return content if whole else None
