"""Fetches one file over HTTP, with a progress bar and time limits."""

import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class FileFailed(Exception):
    """A mirror does not have this file, or not the right one; the message is the reason."""


class MirrorFailed(Exception):
    """A mirror cannot be used at all; the message is the reason."""


@dataclass(frozen=True)
class Patience:
    """Time limits in seconds, after which a mirror is given up."""

    connect: float = 5.0
    """Time until a connection exists."""
    read: float = 30.0
    """Time until the next bytes arrive."""
    file: float = 3600.0
    """Time for a whole file, however steadily it trickles: archives have hundreds of megabytes."""
    package: float = 180.0
    """Time for npm to fetch a package."""


def fetch(url: str, target: Path, label: str, patience: Patience) -> None:
    """Write the answer of `url` into `target` as it arrives.

    Raises FileFailed if the file cannot be fetched, MirrorFailed if no other can be either, and
    OSError if `target` cannot be written.
    """
    # Imported here, because they take a quarter of a second, and reading a config should not.
    import requests
    from pooch import HTTPDownloader
    from tqdm import tqdm
    from urllib3.exceptions import HTTPError

    deadline = _Deadline(patience.file)
    # A bar without a total counts as false, and pooch would pass it over.
    bar = tqdm(total=1, desc=label, unit="B", unit_scale=True, disable=None, leave=False)
    get = HTTPDownloader(
        progressbar=bar,
        chunk_size=1 << 16,
        timeout=(patience.connect, patience.read),
        headers={"Accept-Encoding": "identity"},
        hooks={"response": deadline.follow},
    )
    try:
        with bar, deadline, open(target, "wb") as out:
            get(url, out, None)
    except (requests.RequestException, HTTPError, ConnectionError, TimeoutError) as error:
        if deadline.expired:
            raise MirrorFailed(f"took longer than {patience.file:g} s for {label}") from None
        _explain(error, patience)


class _Deadline:
    """Ends an answer that takes too long as a whole, even if it never stalls for long."""

    def __init__(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._raw: Any = None
        self.expired = False

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def follow(self, response: Any, **_: object) -> None:
        """A requests hook: `response` is the one whose body comes next."""
        self._raw = response.raw

    def _expire(self) -> None:
        self.expired = True
        if self._raw is not None:
            # The answer may have ended by itself just now.
            with suppress(OSError, RuntimeError, ValueError):
                self._raw.shutdown()


def _explain(error: Exception, patience: Patience) -> None:
    """Raise FileFailed or MirrorFailed with a short reason for what requests raised."""
    import requests

    text = repr(error)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        raise FileFailed(f"HTTP {error.response.status_code} {error.response.reason}") from None
    if isinstance(error, requests.ConnectTimeout):
        raise MirrorFailed(f"no connection within {patience.connect:g} s") from None
    if isinstance(error, requests.ReadTimeout) or "ReadTimeoutError" in text:
        raise MirrorFailed(f"silent for {patience.read:g} s") from None
    if isinstance(error, requests.exceptions.ChunkedEncodingError) or "IncompleteRead" in text:
        raise FileFailed("truncated on the way, not kept") from None
    if isinstance(error, requests.exceptions.ProxyError):
        raise MirrorFailed(f"the proxy does not let us through: {_root(error)}") from None
    if isinstance(error, requests.exceptions.SSLError):
        raise MirrorFailed(f"no secure connection: {_root(error)}") from None
    if isinstance(error, ConnectionError | requests.ConnectionError):
        raise MirrorFailed(f"no connection: {_root(error)}") from None
    raise MirrorFailed(f"no usable answer: {_root(error)}") from None


def _root(error: BaseException) -> str:
    """The innermost cause in words, as the outer ones only repeat it."""
    seen = error
    while True:
        inner = getattr(seen, "reason", None) or next(
            (arg for arg in seen.args if isinstance(arg, BaseException)), seen.__cause__
        )
        if not isinstance(inner, BaseException):
            break
        seen = inner
    return getattr(seen, "strerror", None) or str(seen) or type(seen).__name__
