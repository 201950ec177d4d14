"""Files dated in the future: each gets the present time once, and no job runs for ever."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from cnnlib.errors import UserError
from cnnlib.paths import ROOT
from workflow.glue.clocks import date_now

DAY = 86400.0


def dated(path: Path, days: float) -> Path:
    """A file that is dated `days` days from now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    then = time.time() + days * DAY
    os.utime(path, (then, then))
    return path


def test_files_of_the_future_get_one_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, data = tmp_path / "code", tmp_path / "results"
    wrong = [dated(code / "a.py", 400), dated(data / "runs/x/run.json", 1)]
    right = [dated(code / "b.py", -1), dated(data / "reference/h100/tables/epochs.csv", 400)]
    before = [path.stat().st_mtime for path in right]
    now = time.time()
    assert date_now([code, data, tmp_path / "nowhere"]) == wrong
    (one,) = {path.stat().st_mtime for path in wrong}
    assert now - 1 < one < now + 60
    assert [path.stat().st_mtime for path in right] == before
    said = capsys.readouterr().err
    assert said == f"dated in the future, now dated today: 2 files ({wrong[0]}, {wrong[1]})\n"
    assert date_now([code, data]) == []
    assert capsys.readouterr().err == ""


def test_a_time_that_cannot_be_changed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dated(tmp_path / "a.py", 1)

    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    with pytest.raises(UserError, match=f"{path} is dated in the future, .*not permitted"):
        date_now([tmp_path])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that make needs, with an environment that counts as made."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for lock in (tmp_path / "requirements").glob("*.txt"):
        dated(lock, -1)
    dated(tmp_path / ".venv/base", -0.5)
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments, ".venv/base"],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=60,
        env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")},
    )


def test_a_lock_of_the_future_is_installed_once(checkout: Path) -> None:
    assert make(checkout, "-q").returncode == 0
    lock = dated(checkout / "requirements/base.txt", 400)
    done = make(checkout, "-n")
    assert "dated in the future: requirements/base.txt; " in done.stdout
    assert "-m venv" in done.stdout
    assert lock.stat().st_mtime <= time.time()
    (checkout / ".venv/base").touch()
    done = make(checkout, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_stamp_of_the_future_does_not_hide_a_new_lock(checkout: Path) -> None:
    dated(checkout / ".venv/base", 400)
    (checkout / "requirements/base.txt").touch()
    done = make(checkout, "-n")
    assert "dated in the future: .venv/base; " in done.stdout
    assert "-m venv" in done.stdout
