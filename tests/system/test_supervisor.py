"""Calls in processes of their own: every way to end is reported, and nothing is left behind."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cnnlib.errors import ConfigError
from cnnlib.paths import ROOT
from cnnlib.system import stop_requests
from cnnlib.system import supervisor as supervising
from cnnlib.system.interrupts import Stopped
from cnnlib.system.processes import children
from cnnlib.system.shared_page import CAPACITY, Page
from cnnlib.system.stop_requests import REQUESTS
from cnnlib.system.supervisor import Died, note, supervise, supervised
from cnnlib.system.traces import innermost


def died(call: Callable[[], Any], **options: Any) -> Died:
    before = children()
    with pytest.raises(Died) as caught:
        supervise(call, **options)
    assert children() <= before
    assert "\n" not in str(caught.value)
    return caught.value


def test_what_it_returns() -> None:
    assert supervise(lambda: {"pid": os.getpid()})["pid"] != os.getpid()
    assert supervise(supervised)
    assert not supervised()
    note(phase="ignored")


@pytest.mark.parametrize(
    "error",
    [ConfigError("no such thing"), MemoryError("too large"), FileNotFoundError(2, "No", "a file")],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_users_are_passed_on(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        supervise(fail)
    assert str(caught.value) == str(error)


def test_a_stop_is_passed_on() -> None:
    def stop() -> None:
        raise Stopped(signal.SIGUSR1, saved=True)

    with pytest.raises(Stopped, match="SIGUSR1") as caught:
        supervise(stop)
    assert (caught.value.number, caught.value.saved) == (signal.SIGUSR1, True)


class Odd(BaseException):
    pass


class Unpicklable(ConfigError):
    def __init__(self) -> None:
        super().__init__("only text")
        self.call = lambda: None


def crash() -> None:
    ctypes.string_at(0)


def fill_the_page() -> bytes:
    return bytes(2 * CAPACITY)


def forget_files() -> None:
    os.closerange(3, 256)
    os._exit(0)


def raise_(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("call", "kind", "how"),
    [
        (crash, "died", "killed by SIGSEGV while training, in "),
        (ctypes.CDLL(None).abort, "died", "killed by SIGABRT while training"),
        (lambda: os._exit(0), "died", "ended its process with exit code 0 while training"),
        (lambda: os._exit(3), "died", "ended its process with exit code 3 while training"),
        (lambda: ctypes.CDLL(None).exit(4), "died", "ended its process with exit code 4"),
        (forget_files, "died", "ended its process with exit code 0 while training"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "died", "killed by SIGKILL while training"),
        (lambda: os.killpg(0, signal.SIGKILL), "died", "killed by SIGKILL while training"),
        (lambda: os.killpg(0, signal.SIGHUP), "died", "killed by SIGHUP while training"),
        (lambda: os.killpg(0, signal.SIGTERM), "raised", "SystemExit: sent itself SIGTERM while"),
        (lambda: os.kill(0, signal.SIGINT), "raised", "SystemExit: sent itself SIGINT while"),
        (sys.exit, "raised", "SystemExit while training"),
        (lambda: sys.exit("enough"), "raised", "SystemExit: enough while training, in "),
        (lambda: raise_(KeyboardInterrupt()), "raised", "KeyboardInterrupt while training, in "),
        (lambda: raise_(Odd("so\nodd")), "raised", "Odd: so odd while training, in raise_ of "),
        (lambda: raise_(ValueError("no")), "raised", "ValueError: no while training, in raise_ of"),
        (lambda: raise_(Unpicklable()), "raised", "Unpicklable: only text while training, in "),
        (fill_the_page, "died", "ended its process with exit code 1 while training"),
    ],
)
def test_how_it_ended(call: Callable[[], Any], kind: str, how: str) -> None:
    def training() -> Any:
        note(device="here", phase="validate")
        note(phase="train")
        return call()

    # a shell has it ignored in what it runs in the background
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        end = died(training)
    finally:
        signal.signal(signal.SIGINT, before)
    assert str(end).startswith(how)
    assert end.kind == kind
    assert end.notes == {"device": "here", "phase": "train"}


def test_the_place_of_a_crash_is_a_file_and_a_line() -> None:
    end = died(crash)
    line = crash.__code__.co_firstlineno + 1
    # no file of the project's own was at work: the innermost one of all
    assert "killed by SIGSEGV in string_at of __init__.py:" in str(end)
    assert f'test_supervisor.py", line {line} in crash' in end.trace
    assert "Extension modules" not in end.trace


def test_the_projects_own_line_comes_first() -> None:
    frames = [("/lib/x.py", 3, "deep"), (str(ROOT / "cnnlib/a.py"), 7, "forward")]
    assert innermost(frames) == "forward of cnnlib/a.py:7"
    assert innermost(frames[:1]) == "deep of x.py:3"
    assert innermost([]) == ""


def test_memory_that_ran_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter((3, 4))
    monkeypatch.setattr(supervising, "memory_shortages", lambda: next(counts))
    end = died(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert str(end) == "killed by SIGKILL; the system had no memory left"


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux only")
def test_the_kernel_ends_the_call_before_the_caller() -> None:
    path = Path("/proc/self/oom_score_adj")
    assert int(supervise(path.read_text)) >= 500 > int(path.read_text())


@pytest.mark.parametrize("sleep", [time.sleep, ctypes.PyDLL(None).sleep], ids=["python", "library"])
def test_a_hang_is_ended(sleep: Callable[[int], Any]) -> None:
    """Also in a library that never gives Python's lock back."""

    def forward() -> None:
        while True:
            sleep(60)

    began = time.monotonic()
    end = died(forward, limit=0.5)
    assert time.monotonic() - began < 50
    assert end.kind == "hung"
    assert str(end).startswith("hangs in forward of test_supervisor.py:")


def test_a_stopped_process_is_a_hang() -> None:
    assert died(lambda: os.kill(os.getpid(), signal.SIGSTOP), limit=0.5).kind == "hung"


LONG, LONGER = (f"{seconds}.{os.getpid()}" for seconds in (98, 99))


def asleep(seconds: str) -> int:
    """How many processes of this machine sleep for so long."""
    found, line = 0, f"sleep\0{seconds}\0".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += process.joinpath("cmdline").read_bytes() == line
    return found


def test_what_is_left_running_is_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Daemons with sessions of their own, whose parents have ended."""

    def leave() -> None:
        code = (
            "import os; os.fork() and os._exit(0); os.setsid();"
            f"os.execvp('sleep', ['sleep', '{LONGER}'])"
        )
        for _ in range(3):
            subprocess.run([sys.executable, "-c", code], check=True)
        subprocess.Popen(["sleep", LONG])  # of the call's own session
        while asleep(LONGER) < 3 or not asleep(LONG):
            time.sleep(0.01)

    before = children()
    supervise(leave)
    assert children() <= before
    assert asleep(LONGER) == asleep(LONG) == 0
    assert capfd.readouterr().err.count("sleep (") == 3


def test_other_children_live_on() -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        assert supervise(lambda: 1) == 1
        assert other.poll() is None
        other.kill()


def test_a_fork_that_returns_too_changes_nothing() -> None:
    for _ in range(5):
        assert supervise(lambda: (os.fork(), "one")[1]) == "one"


def test_output_is_printed_once(tmp_path: Path) -> None:
    code = (
        "import sys; from cnnlib.system.supervisor import supervise; print('before');"
        "supervise(lambda: print('within')); print('after')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "before\nwithin\nafter\n"


# requests ---------------------------------------------------------------------------------------


class Request(BaseException):
    pass


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Handlers that raise Request, as those of the command line raise SystemExit."""

    def handle(number: int, frame: Any) -> None:
        raise Request(number)

    before = {number: signal.signal(number, handle) for number in REQUESTS}
    yield handle
    for number, handler in before.items():
        assert signal.getsignal(number) is handle
        signal.signal(number, handler)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(REQUESTS)


def send(number: int, target: int, begun: Path) -> subprocess.Popen[bytes]:
    """Start a program that sends the signal as soon as there is a file `begun`."""
    command = f"until [ -e '{begun}' ]; do sleep 0.05; done; kill -{int(number)} {target}"
    return subprocess.Popen(["sh", "-c", command])


@pytest.mark.parametrize("number", REQUESTS)
@pytest.mark.parametrize("alone", [False, True], ids=["caller", "call alone"])
def test_a_request_is_no_failure(
    handled: Any, tmp_path: Path, number: signal.Signals, alone: bool
) -> None:
    """Whichever of the two processes a person or a scheduler sends it to."""
    begun = tmp_path / "begun"

    def call() -> None:
        if alone:
            send(number, os.getpid(), begun)
        try:
            begun.touch()
            time.sleep(60)
        finally:
            (tmp_path / "tidied").touch()

    sender = None if alone else send(number, os.getpid(), begun)
    with pytest.raises(Request) as caught:
        supervise(call)
    if sender:
        sender.wait()
    assert caught.value.args == (number,)
    assert (tmp_path / "tidied").exists()


def test_a_request_ends_a_call_that_does_not_listen(
    handled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_requests, "GRACE", 0.3)
    begun, began = tmp_path / "begun", time.monotonic()

    def call() -> None:
        begun.touch()
        for _ in range(9):
            ctypes.PyDLL(None).sleep(60)

    with send(signal.SIGTERM, os.getpid(), begun), pytest.raises(Request):
        supervise(call)
    assert time.monotonic() - began < 60


def test_a_patient_request_leaves_all_the_time(
    handled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_requests, "GRACE", 0.1)
    begun = tmp_path / "begun"

    def call() -> str:
        from cnnlib.system.interrupts import asked_to_stop

        with asked_to_stop() as stop:
            begun.touch()
            while not stop():
                time.sleep(0.01)
            time.sleep(0.5)
        return f"saved on {stop()}"

    with send(signal.SIGTERM, os.getpid(), begun):
        assert supervise(call, patient=True) == "saved on 15"


def test_a_killed_caller_takes_the_call_with_it(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, time; from cnnlib.system.supervisor import supervise;"
        f"supervise(lambda: (pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())),"
        "time.sleep(60)))"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    ends = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < ends
        time.sleep(0.02)
    caller.kill()
    caller.wait()
    call = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    while call.exists() and call.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < ends
        time.sleep(0.02)


# the page ---------------------------------------------------------------------------------------


def test_notes_of_any_length() -> None:
    page = Page()
    assert page.notes == {}
    for length in (1, 300, 2, 4000, 3):
        page.note(phase="x" * length)
        assert page.notes == {"phase": "x" * length}
    page.note(phase="x" * 10_000)  # does not fit: the one before it stays
    assert page.notes == {"phase": "xxx"}
    assert page.get() is None
    page.put(("returned", [1, 2]))
    assert page.get() == ("returned", [1, 2])
    assert page.notes == {"phase": "xxx"}


def test_a_page_that_a_stage_has_written_over_says_nothing() -> None:
    page = Page()
    page.put(("returned", 1))
    page._memory[:] = b"\x01" * CAPACITY
    assert page.notes == {}
    assert page.get() is None
