"""A checkout has the same bytes under every setting of git, those of Windows and WSL included."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cnnlib.paths import ROOT

pytestmark = pytest.mark.quick

GIT = ["git", "-c", "safe.directory=*"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git checkout")
@pytest.mark.parametrize("settings", [["autocrlf=true"], ["autocrlf=false", "eol=crlf"]])
def test_line_ends_do_not_depend_on_gits_settings(tmp_path: Path, settings: list[str]) -> None:
    chosen = [word for setting in settings for word in ("-c", f"core.{setting}")]
    subprocess.run([*GIT, "clone", "-q", *chosen, ROOT, tmp_path / "clone"], check=True)
    done = subprocess.run(
        [*GIT, "ls-files", "--eol"],
        cwd=tmp_path / "clone",
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) > 100
    # in the index, in the folder; an empty file has no line ends
    found = {(line[0], line[1]) for line in lines} - {("i/none", "w/none")}
    assert found == {("i/lf", "w/lf"), ("i/-text", "w/-text")}
    assert {Path(line[-1]).suffix for line in lines if line[1] == "w/-text"} == {".npz", ".png"}
    if shutil.which("g++"):
        script = tmp_path / "clone/requirements/find_python.sh"
        subprocess.run(["sh", script], capture_output=True, timeout=60, check=True)
