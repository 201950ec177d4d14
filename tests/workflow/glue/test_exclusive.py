"""One measurement at a time on one machine."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cnnlib.paths import ROOT

pytestmark = pytest.mark.quick


def test_only_one_measurement_at_a_time(tmp_path: Path) -> None:
    """The second command starts when the first has ended, even if the caller of that is gone."""
    log, go = tmp_path / "log", tmp_path / "go"
    script = f"echo begin >> '{log}'; until [ -e '{go}' ]; do sleep 0.05; done; echo end >> '{log}'"
    command = [sys.executable, "-m", "workflow.glue.exclusive", "sh", "-c", script]
    options: dict[str, Any] = dict(
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    first = subprocess.Popen(command, **options)
    while not log.exists():
        assert first.poll() is None
        time.sleep(0.02)
    second = subprocess.Popen(command, **options)
    assert second.stderr is not None
    assert "waiting for another measurement" in second.stderr.readline()
    assert log.read_text().split() == ["begin"]
    go.touch()
    assert [process.communicate(timeout=60)[1] for process in (first, second)] == ["", ""]
    assert log.read_text().split() == ["begin", "end"] * 2
