"""Resuming after a crash without an option from the user.

Snakemake marks every job that it has begun and locks the working directory. When the process is
killed, marks and locks stay, and the next call refuses to work without --rerun-incomplete and
--unlock. Both are safe to imply here: outputs appear whole or not at all, and a lock of our own,
which the kernel releases when its process dies, shows whether another run is still at work.
A default profile could imply the first, but Snakemake looks for one only in profiles/ beside the
Snakefile or in the working directory, and `snakemake --cores 1 all` names none.
"""

import fcntl
import os
from pathlib import Path
from typing import Any

from snakemake.dag import DAG
from snakemake.persistence import FileBackupMixin, PersistenceBase

_held: list[int] = []


def _imply_rerun_incomplete() -> None:
    """Make Snakemake act as if --rerun-incomplete were given when it looks for such jobs."""
    check = DAG.check_incomplete
    if getattr(check, "implies_rerun", False):
        return

    async def check_incomplete(self: Any) -> None:
        self.workflow.dag_settings.force_incomplete = True
        await check(self)

    check_incomplete.implies_rerun = True  # type: ignore[attr-defined]
    DAG.check_incomplete = check_incomplete


def _keep_outputs_until_replaced() -> None:
    """Leave outputs marked update() alone when their job fails, and run that job again next time.

    Snakemake copies such a file before the job and back after a failure, and then takes it for
    what the job should have made: an old figure whose drawing failed would count as up to date.
    Our programs replace a file by a whole new one when they are done, so that no copy is needed.
    Jobs that leave old outputs behind stay marked as incomplete.
    """
    left: set[Path] = set()
    record = PersistenceBase.finished
    if getattr(record, "knows_old_outputs", False):
        return

    def backup_output(self: Any, path: Path) -> None:
        left.discard(path)

    def restore_output(self: Any, path: Path) -> bool:
        left.add(path)
        return path.exists()

    async def finished(self: Any, job: Any) -> None:
        if left.isdisjoint(map(Path, job.output)):
            await record(self, job)

    finished.knows_old_outputs = True  # type: ignore[attr-defined]
    FileBackupMixin.backup_output = backup_output
    FileBackupMixin.restore_output = restore_output
    PersistenceBase.finished = finished


def recover(workflow: Any) -> None:
    """Run incomplete jobs again, keep old outputs until they are replaced, and remove Snakemake's
    lock if no other run is at work here.
    """
    _imply_rerun_incomplete()
    _keep_outputs_until_replaced()
    if not workflow.is_main_process or workflow.dryrun or _held:
        return
    folder = Path(".snakemake")
    try:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder / "running", os.O_CREAT | os.O_RDWR, 0o666)
    except OSError:
        return  # a read-only folder: Snakemake itself will report it
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return  # another call is at work: Snakemake's own lock decides
    _held.append(handle)  # kept open, and so locked, until this process ends
    for lock in (folder / "locks").glob("*.lock"):
        lock.unlink(missing_ok=True)
