"""Chromium, which prints the poster: found, given files that it can read, and ended when it hangs.

Installed as a snap, as on Ubuntu, it sees neither /tmp nor hidden folders: its pages must lie in
the snap's own folder below the home folder.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from cnnlib.errors import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ALWAYS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
PATIENCE = 180.0
"""Seconds after which a browser counts as hanging: printing a poster takes a few."""


def find_browser() -> str:
    """Chromium's program; UserError with the remedy where there is none."""
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    raise UserError(
        f"the poster is printed by Chromium, which is not here ({', '.join(BROWSERS)}); "
        "on Debian: apt-get install chromium"
    )


def snap_of(browser: str) -> str | None:
    """The name of the snap that a program belongs to; None: it is an ordinary program."""
    path = Path(browser)
    if path.parts[-3:-1] == ("snap", "bin") or path.resolve().name == "snap":
        return path.name
    # what Ubuntu's package chromium-browser installs is a script that starts the snap
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        if found := re.search(rb"^#!.*?/snap/bin/([\w.-]+)", stream.read(1 << 14), re.DOTALL):
            return found[1].decode()
    return None


@contextlib.contextmanager
def scratch(browser: str) -> Iterator[Path]:
    """A temporary folder in which the browser can read and write."""
    parent = None
    if snap := snap_of(browser):
        try:
            parent = Path.home() / "snap" / snap / "common"
            parent.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{browser} is a snap, which can only read below the home folder, and that has no "
                f"folder for it: {error}"
            ) from None
    with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def run(browser: str, folder: Path, arguments: Sequence[str]) -> tuple[str, str]:
    """Run the browser with a profile in `folder`; returns its output and its errors.

    After PATIENCE it is ended with all its processes. Raises UserError then, and when it cannot be
    run.
    """
    command = [browser, *ALWAYS, f"--user-data-dir={folder}/profile", *arguments]
    # into files: a pipe would be waited for as long as any process of the browser holds it open
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"{browser} cannot be run: {error.strerror}") from None
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{browser} hangs: it was ended after {PATIENCE:g} s without a result"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = []
        for stream in (out, errors):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
        return texts[0], texts[1]


def print_page(browser: str, html: str) -> bytes:
    """The page as PDF. Raises UserError when the browser hangs or prints nothing."""
    with scratch(browser) as folder:
        source, printed = folder / "page.html", folder / "page.pdf"
        source.write_text(html, encoding="utf-8")
        _, errors = run(
            browser,
            folder,
            [
                "--no-pdf-header-footer",
                "--disable-pdf-tagging",  # tags are numbered in no fixed order
                f"--print-to-pdf={printed}",
                source.as_uri(),
            ],
        )
        if not printed.exists():
            said = " ".join(errors.split())[-300:]
            raise UserError(f"{browser} has printed nothing: {said or 'it gives no reason'}")
        return printed.read_bytes()
