"""Compiled code on disk, known by the content it was made from."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from cnnlib.device.cache_folder import REMEDY, cache_folder
from cnnlib.errors import DeviceError, UserError
from cnnlib.files import write_whole

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

_MARK = b"\ncnnlib sha256 "


def kernels_folder() -> Path:
    """The folder of kernel sources, an include path of every compiler: $CNNLIB_KERNELS, or ours."""
    chosen = os.environ.get("CNNLIB_KERNELS")
    return Path(chosen).resolve() if chosen else KERNELS


def kernel_files(*patterns: str) -> list[Path]:
    """Files of the folder of kernels that match, in a fixed order."""
    folder = kernels_folder()
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def content_key(parts: Iterable[str | bytes], files: Iterable[Path] = ()) -> str:
    """A name for what comes out of these texts and files: 40 hexadecimal digits."""
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

    A digest follows the content, so that a damaged entry is seen and built again (a loader of
    shared libraries does not read so far). Two processes may build at once: each renames a whole
    file into place and either will do.
    """
    target = cache_folder() / f"{key}{suffix}"
    if not _is_whole(target):
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
    return target


def content_of(path: Path) -> bytes:
    """What `build` wrote to a cached file, without the digest."""
    return path.read_bytes()[: -len(_MARK) - 64]


def _is_whole(path: Path) -> bool:
    try:
        data = path.read_bytes()
    except OSError:
        return False
    content, mark, digest = (
        data[: -len(_MARK) - 64],
        data[-len(_MARK) - 64 : -64],
        data[-64:],
    )
    return mark == _MARK and hashlib.sha256(content).hexdigest().encode() == digest
