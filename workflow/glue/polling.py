"""Snakemake's main process stays quiet while a job of its own is timed.

With a limit of jobs a second, which is Snakemake's default, each pass of the scheduler starts a
timer for another pass, and so does the pass that follows. Every job that ends adds a pass. After a
hundred jobs there are therefore a hundred passes a second beside what is being measured, and every
pass looks at all jobs that wait. In a workflow of 51 short jobs they took 4 of 54 CPU seconds. One
such timer at a time serves as well.
"""

import threading
import time
from typing import Any

from snakemake.scheduling.job_scheduler import JobScheduler


def look_once_in_a_while() -> None:
    """Let a scheduler have one timer at a time, and let none of them delay the end."""
    begin = JobScheduler._schedule_reevalutation
    if getattr(begin, "one_at_a_time", False):
        return

    def schedule(self: Any, delay: float) -> None:
        now = time.monotonic()
        if now < getattr(self, "looks_at", 0.0) <= now + delay:
            return

        def look() -> None:
            self.looks_at = 0.0
            self._open_jobs.release()

        self.looks_at = now + delay
        timer = threading.Timer(delay, look)
        timer.daemon = True
        timer.start()

    schedule.one_at_a_time = True  # type: ignore[attr-defined]
    JobScheduler._schedule_reevalutation = schedule
