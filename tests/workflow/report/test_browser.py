"""Chromium as a snap, which cannot read every folder; one that hangs, prints nothing, or another
page than it was given.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from cnnlib.errors import UserError
from workflow.report import browser, poster

# A browser that is confined like a snap: it has a /tmp of its own and cannot enter hidden folders.
# For a file that it cannot read it prints an error page of Letter size; where it cannot write, it
# prints nothing.
CONFINED = f"""#!{sys.executable}
import os, sys
from pathlib import Path
from urllib.parse import unquote, urlparse
own = Path(os.environ["HOME"], "snap", "chromium", "common")
def visible(path):
    return own in path.parents and not any(p.startswith(".") for p in path.relative_to(own).parts)
source = Path(unquote(urlparse(sys.argv[-1]).path))
(printed,) = [Path(a.partition("=")[2]) for a in sys.argv if a.startswith("--print-to-pdf=")]
(profile,) = [Path(a.partition("=")[2]) for a in sys.argv if a.startswith("--user-data-dir=")]
readable = visible(source) and visible(profile) and source.read_text()
size = "1683.84 2383.92" if readable == "the page" else "612 792"
if visible(printed):
    printed.write_text(f"%PDF /MediaBox [0 0 {{size}}]")
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and a PATH without a browser until a test puts one there."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sleep").symlink_to(str(shutil.which("sleep")))
    monkeypatch.setenv("PATH", f"{tmp_path}/snap/bin:{tmp_path}/bin")
    monkeypatch.setattr(browser, "PATIENCE", 60.0)
    return tmp_path / "home"


@pytest.mark.parametrize("way", ["snap/bin", "link to snap", "script of Ubuntu's package"])
def test_a_snap_prints_from_its_own_folder(home: Path, tmp_path: Path, way: str) -> None:
    real = program(tmp_path / "snap/bin/chromium", CONFINED)
    if way == "link to snap":
        real.rename(tmp_path / "snap/bin/snap")
        (tmp_path / "bin/chromium").symlink_to(tmp_path / "snap/bin/snap")
    elif way == "script of Ubuntu's package":
        real.rename(tmp_path / "snap/bin/chromium-real")
        script = f'#!/bin/sh\n# starts /snap/bin/chromium\nexec {real}-real "$@"\n'
        program(tmp_path / "bin/chromium-browser", script)
    poster.print_page("the page", tmp_path / "poster.pdf")
    assert b"1683.84" in (tmp_path / "poster.pdf").read_bytes()
    assert list((home / "snap/chromium/common").iterdir()) == []


def test_an_ordinary_browser_leaves_the_home_folder_alone(home: Path, tmp_path: Path) -> None:
    printed = "case $word in --print-to-pdf=*) echo '/MediaBox [0 0 1684 2384]' > ${word#*=};; esac"
    program(tmp_path / "bin/chromium", f"#!/bin/sh\nfor word; do\n{printed}\ndone\n")
    poster.print_page("the page", tmp_path / "poster.pdf")
    assert list(home.iterdir()) == []


def test_a_snap_without_a_folder_of_its_own(home: Path, tmp_path: Path) -> None:
    program(tmp_path / "snap/bin/chromium", CONFINED)
    (home / "snap").touch()
    with pytest.raises(UserError, match="chromium is a snap, which can only read below the home"):
        poster.print_page("the page", tmp_path / "poster.pdf")


def test_another_page_than_ours_is_no_poster(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser that is confined without looking so, and can only write in its folder."""
    program(tmp_path / "bin/chromium", CONFINED)
    (home / "snap/chromium/common").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(home / "snap/chromium/common"))
    with pytest.raises(UserError, match="something else than one A1 page") as caught:
        poster.print_page("another page", tmp_path / "poster.pdf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "poster.pdf").exists()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'no usable display' >&2\necho 'and more' >&2", "printed nothing: no usable display"),
        ("exit 3", "printed nothing: it gives no reason"),
    ],
)
def test_nothing_printed(home: Path, tmp_path: Path, script: str, reason: str) -> None:
    program(tmp_path / "bin/chromium", f"#!/bin/sh\n{script}\n")
    with pytest.raises(UserError, match=reason) as caught:
        poster.print_page("the page", tmp_path / "poster.pdf")
    assert "\n" not in str(caught.value)


def test_a_browser_that_cannot_be_run(home: Path, tmp_path: Path) -> None:
    program(tmp_path / "bin/chromium", "#!/nowhere/sh\n")
    with pytest.raises(UserError, match="cannot be run: No such file"):
        poster.print_page("the page", tmp_path / "poster.pdf")


def test_a_browser_that_hangs_is_ended_with_all_that_it_began(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser, "PATIENCE", 4.0)
    begun = tmp_path / "begun"
    script = f"#!/bin/sh\nsleep 600 &\necho $! $$ > {begun}\nwait\n"
    program(tmp_path / "bin/chromium", script)
    began = time.monotonic()
    with pytest.raises(UserError, match="chromium hangs: it was ended after 4 s"):
        poster.print_page("the page", tmp_path / "poster.pdf")
    assert time.monotonic() - began < 60
    for process in map(int, begun.read_text().split()):
        assert not running(process)


def running(process: int) -> bool:
    """Whether the process exists and is no zombie; a killed one may take a moment to vanish."""
    for _ in range(600):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    os.kill(process, 9)
    return True
