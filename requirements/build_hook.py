"""Writes the commit that a wheel or a source distribution is built from into it.

What is measured with an installed package can then say which code it was, as in a checkout.
"""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FILE = "cnnlib/commit.txt"
"""Its place in what is built; cnnlib.system.machine reads it."""


class CommitHook(BuildHookInterface):
    """Finds the commit by git, or in the source distribution that a wheel is built from."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        given = (Path(self.root) / FILE).exists()  # in a source distribution
        if given or version == "editable":  # whose modules are those of the checkout
            return
        self.folder = tempfile.TemporaryDirectory()
        found = Path(self.folder.name, "commit.txt")
        found.write_text(commit(self.root), encoding="utf-8")
        build_data["force_include"][str(found)] = FILE

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


def commit(root: str) -> str:
    """The commit of the checkout at `root`, as cnnlib.system.machine.commit says it; '' outside."""
    if not (Path(root) / ".git").exists():
        return ""
    try:
        head = git(root, "rev-parse", "HEAD")
        changed = git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+changes" if changed else "")


def git(root: str, *arguments: str) -> str:
    """What git prints about the checkout at `root`; SubprocessError if it fails."""
    done = subprocess.run(
        ["git", "-C", root, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()
