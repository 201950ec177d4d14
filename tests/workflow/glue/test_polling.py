"""Snakemake's scheduler has one timer at a time."""

import threading
import time
from types import SimpleNamespace

import pytest
from snakemake.scheduling.job_scheduler import JobScheduler

from workflow.glue.polling import look_once_in_a_while


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the method that is replaced needs of a scheduler."""
    monkeypatch.setattr(
        JobScheduler, "_schedule_reevalutation", JobScheduler._schedule_reevalutation
    )
    return SimpleNamespace(_open_jobs=threading.Semaphore(0))


def count(passes: SimpleNamespace) -> int:
    """Passes that were asked for until nothing comes for half a second."""
    found = 0
    while passes._open_jobs.acquire(timeout=0.5):
        found += 1
    return found


def test_many_wishes_are_one_timer(passes: SimpleNamespace) -> None:
    look_once_in_a_while()
    look_once_in_a_while()
    for _ in range(20):
        JobScheduler._schedule_reevalutation(passes, 0.1)
    assert count(passes) == 1
    JobScheduler._schedule_reevalutation(passes, 0.1)  # the next one is not forgotten
    assert count(passes) == 1


def test_a_sooner_one_does_not_wait_for_a_later_one(passes: SimpleNamespace) -> None:
    look_once_in_a_while()
    JobScheduler._schedule_reevalutation(passes, 60.0)
    began = time.monotonic()
    JobScheduler._schedule_reevalutation(passes, 0.1)
    assert passes._open_jobs.acquire(timeout=30)
    assert time.monotonic() - began < 30
