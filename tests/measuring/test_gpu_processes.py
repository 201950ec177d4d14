"""Other processes on the GPU: which ones count as others, and when they were there."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cnnlib.measuring.gpu_processes import ProcessTracker, is_or_descends_from, others

pytestmark = pytest.mark.quick

OWN, ANOTHER = os.getpid(), 2**22 + 7  # above the largest process id of a system


def listed(*processes: int, mib: int | None = 100) -> list[SimpleNamespace]:
    memory = None if mib is None else mib * 2**20
    return [SimpleNamespace(pid=process, usedGpuMemory=memory) for process in processes]


def watched(*looks: tuple[float, list[SimpleNamespace] | None]) -> ProcessTracker:
    tracker = ProcessTracker(OWN)
    for at, seen in looks:
        tracker.look(at, seen, name=lambda process: f"program {process}")
    return tracker


def disturbing(tracker: ProcessTracker, *spans: tuple[float, float]) -> list[int]:
    return [presence.process for presence in others(tracker.presences, spans)]


def test_alone() -> None:
    tracker = watched((1, listed()), (2, listed(OWN)), (3, listed(OWN)))
    assert disturbing(tracker, (0, 9)) == []


def test_somebody_else_from_the_look_before_to_the_look_after() -> None:
    both = listed(OWN, ANOTHER)
    tracker = watched((1, listed(OWN)), (2, both), (3, both), (4, listed(OWN)), (5, listed(OWN)))
    for span in ((2.4, 2.6), (1.2, 1.4), (3.5, 3.6), (0.0, 9.0)):
        assert disturbing(tracker, span) == [ANOTHER]
    assert disturbing(tracker, (0.0, 0.9), (4.1, 5.0)) == []
    (presence,) = others(tracker.presences, [(2, 3)])
    assert (presence.name, presence.memory_mib) == (f"program {ANOTHER}", 100)


def test_somebody_who_was_there_before_and_stays() -> None:
    """Without a look before or after it, a short run may not have been alone."""
    tracker = watched((5, listed(OWN, ANOTHER)))
    assert disturbing(tracker, (1, 2)) == disturbing(tracker, (8, 9)) == [ANOTHER]


def test_who_comes_again_is_there_twice() -> None:
    both, alone = listed(OWN, ANOTHER), listed(OWN)
    tracker = watched((1, both), (2, alone), (3, alone), (4, both), (5, alone))
    assert disturbing(tracker, (0, 9)) == [ANOTHER, ANOTHER]
    assert disturbing(tracker, (2.1, 2.9)) == []


def test_the_most_memory_is_told() -> None:
    tracker = watched(*((at, listed(ANOTHER, mib=mib)) for at, mib in enumerate((1, 9, None, 4))))
    assert [presence.memory_mib for presence in tracker.presences] == [9]


def test_nvml_that_does_not_answer_excludes_no_process() -> None:
    tracker = watched((1, listed(OWN)), (2, listed(OWN, ANOTHER)), (3, None), (4, None))
    assert disturbing(tracker, (3.4, 3.6)) == [ANOTHER]
    assert disturbing(watched((1, None)), (0, 9)) == []
    # An empty list is an answer too.
    assert disturbing(watched((1, listed(OWN, ANOTHER)), (2, [])), (2.5, 3)) == []


def test_a_container_where_the_run_has_another_number() -> None:
    far, further = ANOTHER, ANOTHER + 1
    assert disturbing(watched((1, listed(far)), (2, listed(far))), (0, 9)) == []
    tracker = watched((1, listed(far)), (2, listed(far, further)), (3, listed(far)), (4, []))
    assert disturbing(tracker, (2.0, 2.5)) == [far, further]
    assert disturbing(tracker, (3.1, 9.0)) == []


def test_children_are_the_run_itself() -> None:
    """Grandchildren count too, whatever the name of their parent is."""
    program = (
        "import subprocess, sys\n"
        "open('/proc/self/comm', 'w').write('a) b 1 (c')\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=0)\n"
        "print(child.pid, flush=True)\nchild.wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        for process in (OWN, child.pid, grandchild):
            assert is_or_descends_from(process, OWN)
        for process in (os.getppid(), 1, ANOTHER):
            assert not is_or_descends_from(process, OWN)
        assert not is_or_descends_from(grandchild, ANOTHER)
        tracker = watched((1, listed(OWN, child.pid, grandchild)))
        assert disturbing(tracker, (-math.inf, math.inf)) == []
        child.stdin.write("\n")


def test_only_new_processes_cost_more_than_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "cnnlib.measuring.gpu_processes.is_or_descends_from",
        lambda process, _: bool(asked.append(process)),
    )
    tracker = ProcessTracker(OWN)
    for at in range(3):
        tracker.look(at, listed(OWN, ANOTHER), lambda process: str(asked.append(process)))
    assert sorted(asked) == sorted(2 * (OWN, ANOTHER))


def test_a_run_that_waits_is_no_other_process() -> None:
    own, sweep = os.getpid(), os.getppid()
    tracker = ProcessTracker(own, sweep)
    tracker.look(1.0, listed(own, sweep))
    assert not others(tracker.presences, [(1.0, 2.0)])
    tracker.look(1.5, listed(own, sweep, 1))
    assert [each.process for each in others(tracker.presences, [(1.0, 2.0)])] == [1]
    alone = ProcessTracker(own)
    alone.look(1.0, listed(own, sweep))
    assert [each.process for each in others(alone.presences, [(1.0, 2.0)])] == [sweep]
