"""Calls of Snakemake in forked processes are like calls in processes of their own."""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.snakemakes import Forking

SNAKEFILE = """
import json, os, signal, sys, tempfile, time
import beside
facts = [sys.argv, sys.path[0], os.getcwd(), tempfile.gettempdir(), os.environ.get("ASKED")]
print(json.dumps([*facts, beside.X]))
{then}
rule all:
    shell: "true"
"""


def write(folder: Path, then: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "Snakefile").write_text(SNAKEFILE.format(then=then))
    (folder / "beside.py").write_text(f"X = {folder.name!r}\n")
    return folder


@pytest.mark.slow(3)
def test_each_call_has_its_own_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASKED", "the tests")
    forking = Forking()
    without = {key: value for key, value in os.environ.items() if key != "ASKED"}
    arguments = ["--cores", "1", "--dry-run"]
    try:
        for name, env in (("a", {"ASKED": "1"}), ("b", {})):
            folder = write(tmp_path / name)
            env["TMPDIR"] = str(folder)
            code, said = forking.call(arguments, folder, without | env, 60)
            assert code == 0, said
            (facts,) = [json.loads(line) for line in said.splitlines() if line.startswith("[[")]
            (program, *given), *others = facts
            assert (Path(program).parts[-2:], given) == (("snakemake", "__main__.py"), arguments)
            assert others == [str(folder), str(folder), str(folder), env.get("ASKED"), name]
            assert "This was a dry-run" in said
        code, said = forking.call(["--snakefile", "none"], tmp_path, without, 60)
        assert code != 0
        assert "none" in said
        # One that is killed, and one that never ends: what comes after them is as before.
        killed = write(tmp_path / "killed", "os.kill(os.getpid(), signal.SIGTERM)")
        assert forking.call(arguments, killed, without, 60)[0] == -15
        hanging = write(tmp_path / "hanging", "time.sleep(600)")
        assert forking.call(arguments, hanging, without, 1)[0] == -9
        assert forking.call(arguments, write(tmp_path / "c"), without, 60)[0] == 0
    finally:
        forking.end()
    assert tempfile.gettempdir() != str(tmp_path / "a")
    assert str(tmp_path / "a") not in sys.path
