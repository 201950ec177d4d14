"""A stage in another process, with an engine here that passes on what it is asked.

To the checks and to the clock it is an engine like any other, while no line of the stage's own code
runs in the process that checks and times it. The stage cannot see who asks, nor change a clock, a
tolerance or a check.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self, cast

import numpy as np

from cnnlib import errors
from cnnlib.device import Device, KernelError
from cnnlib.engine import (
    Bytes,
    Engine,
    ImageByImage,
    KernelTime,
    Order,
    OwnLoop,
    Setup,
    Stage,
)
from cnnlib.engine.shuffle import Shuffle
from cnnlib.judging.messages import AnyArray, Head, Message, receive, send
from cnnlib.judging.worker import setup_as_values
from cnnlib.layers import Array
from cnnlib.system.processes import adopting_orphans, children, end_with_leftovers, how_it_ended
from cnnlib.training.target import Target

KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        *(each for each in vars(errors).values() if isinstance(each, type)),
        KernelError,
        MemoryError,
    )
    if issubclass(kind, Exception)
}
"""Exceptions of a worker that are raised again here; all others become StageFailed."""
PACKAGES = Path(__file__).parents[2]
"""The folder with the package cnnlib, of a checkout or an installation."""
CONNECT_SECONDS = 120.0
"""Time that a worker may take to start; under a tool such as compute-sanitizer it takes long."""


class StageFailed(errors.UserError):
    """A stage raised an exception, hung or ended its process; the message says which."""


class Worker:
    """The process of one stage. A context manager; at its end all that it started is ended."""

    def __init__(
        self,
        stage: str,
        device: str,
        *,
        where: str = "judge",
        limit: float = 600.0,
        log: Path | None = None,
        under: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        """`stage` is a name or a file. `under` is a tool's command in front of Python's, `env` is
        added to the environment, `limit` is the time in seconds that one request may take, and
        `log` the file to which the process writes what it prints.
        """
        self.stage_name, self.device, self.where = stage, device, where
        self.limit = limit
        self._under, self._env, self._log = list(under), dict(env or {}), log
        self._opened = contextlib.ExitStack()
        self._engines = 0
        self.described: Head = {}

    def __enter__(self) -> Self:
        self._opened.enter_context(adopting_orphans())
        folder = Path(self._opened.enter_context(tempfile.TemporaryDirectory(prefix="judge-")))
        path = folder / "socket"
        self.log = self._log or folder / "log"
        listener = self._opened.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(1)
        said = self._opened.enter_context(self.log.open("wb"))
        self._before = children()
        command = [*self._under, sys.executable, "-m", "cnnlib.judging.worker", str(path)]
        command += ["under-a-tool"] if self._under else []
        paths = [str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **self._env},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._opened.callback(self._end)
        try:
            self._accept(listener)
            self.described = self.ask("describe", stage=self.stage_name, where=self.where).head
            self.target = Target(**self.ask("target", device=self.device).head)  # type: ignore[arg-type]
        except BaseException:
            self._opened.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def _accept(self, listener: socket.socket) -> None:
        ends = time.monotonic() + CONNECT_SECONDS
        listener.settimeout(0.05)
        while True:
            try:
                self._socket, _ = listener.accept()
            except TimeoutError:
                if self.process.poll() is not None:
                    raise self._ended() from None
                if time.monotonic() > ends:
                    raise StageFailed(f"{self._who} does not start: {self.said()}") from None
            else:
                self._socket.setblocking(True)
                self._opened.callback(self._socket.close)
                return

    @property
    def _who(self) -> str:
        return f"stage '{self.described.get('name', self.stage_name)}'"

    def ask(self, do: str, arrays: Sequence[AnyArray] = (), **values: object) -> Message:
        """The answer to one request. Raises what the stage raised, or StageFailed."""
        try:
            send(self._socket, {"do": do, **values}, arrays)
            if not select.select([self._socket], [], [], self.limit)[0]:
                raise StageFailed(f"{self._who} hangs: '{do}' took longer than {self.limit:g} s")
            answer = receive(self._socket)
        except (EOFError, OSError):
            raise self._ended() from None
        except (ValueError, TypeError, KeyError) as error:
            raise StageFailed(f"{self._who} answers '{do}' with nonsense: {error}") from None
        if "raised" in answer.head:
            raise self._raised(answer.head)
        return answer

    def _raised(self, head: Head) -> Exception:
        text = " ".join(str(head["text"]).split())
        for kind in cast(list[str], head["kinds"]):
            if kind in KINDS and kind not in ("Exception", "UserError"):
                return KINDS[kind](text)
        if "UserError" in cast(list[str], head["kinds"]):
            return errors.UserError(text)
        name = str(head["raised"])
        return StageFailed(f"{self._who} raises {name}: {text}" if text else f"raises {name}")

    def _ended(self) -> StageFailed:
        try:
            code = self.process.wait(10.0)
        except subprocess.TimeoutExpired:
            return StageFailed(f"{self._who} closed its connection: {self.said()}")
        status = -code if code < 0 else code << 8
        return StageFailed(f"{self._who} {how_it_ended(status)}: {self.said()}")

    def said(self, most: int = 300) -> str:
        """The last of what the process has printed, in one line."""
        text = " ".join(self.log.read_text(errors="replace").split())
        return text[-most:] or "it printed nothing"

    def busy_seconds(self) -> float:
        """Processor time that the process, and all of its session, have used."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, IndexError, ValueError):  # one that has just ended
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def finish(self, seconds: float = 60.0) -> int:
        """Close the connection and wait for the process to end by itself; returns its exit code.

        Tools such as compute-sanitizer report at the end of the process.
        """
        self._socket.close()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise StageFailed(f"{self._who} does not end: {self.said()}") from None

    def _end(self) -> None:
        if self.process.returncode is None:
            end_with_leftovers(self.process.pid, self._before)
            self.process.returncode = -signal.SIGKILL  # it has been waited for
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def stage(self) -> Stage:
        """A record whose engine passes on what it is asked; it has no operators of its own."""
        said = self.described
        base = RemoteImages if said["by_image"] else RemoteEngine
        base = RemoteLoop if said["loop"] else base
        return Stage(
            name=str(said["name"]),
            title=str(said["title"]),
            change=str(said["change"]),
            runs_on="cpu",  # no device is opened in this process
            engine=type(str(said["engine"]), (base,), {"worker": self}),
            dtype=np.dtype(str(said["dtype"])),
            rounding=cast(float | None, said["rounding"]),
            slack=cast(float, said["slack"]),
            conv_weight_slack=cast(float | None, said["conv_weight_slack"]),
            repeatable=bool(said["repeatable"]),
            threads=1,  # of this process, while the other one works
            color=str(said["color"]),
            marker=str(said["marker"]),
        )

    def number(self) -> int:
        """A number for another engine."""
        self._engines += 1
        return self._engines


class RemoteEngine(Engine):
    """Passes on what it is asked to an engine in another process."""

    worker: ClassVar[Worker]
    step_losses: Array | None = None

    def __init__(self, stage: Stage, setup: Setup, device: Device | None = None) -> None:
        self.stage, self.setup, self.network = stage, setup, setup.network
        self.number = self.worker.number()
        said = self._ask("open", setup=setup_as_values(setup)).head
        self._served = [str(text) for text in cast(list[str], said["served"])]
        self._choices = cast(dict[str, object], said["choices"])

    def _ask(self, do: str, arrays: Sequence[AnyArray] = (), **values: object) -> Message:
        return self.worker.ask(do, arrays, engine=self.number, **values)

    @property
    def served(self) -> list[str]:
        return self._served

    @property
    def choices(self) -> Mapping[str, object]:
        return self._choices

    def load(self, images: Bytes, labels: Bytes) -> None:
        self._ask("load", [images, labels])

    def train(self, order: Order, rates: Array | None = None) -> float:
        return self._trained(self._ask("train", [order, *_perhaps(rates)]))

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        # The tables alone are passed on: the other process learns neither the seed nor the epoch.
        arrays = [shuffle.tables, *_perhaps(rates)]
        return self._trained(self._ask("train_epoch", arrays, count=len(shuffle)))

    def _trained(self, answer: Message) -> float:
        self.step_losses = answer.arrays[0] if answer.arrays else None
        return _number(answer)

    def gradient(self, images: Bytes, labels: Bytes) -> tuple[float, Array]:
        answer = self._ask("gradient", [images, labels])
        return _number(answer), _vector(answer)

    def backward(self, images: Bytes, output_error: Array) -> Array:
        return _vector(self._ask("backward", [images, output_error]))

    def logits(self, images: Bytes) -> Array:
        return _vector(self._ask("logits", [images]))

    def _get(self, name: str) -> Array:
        return _vector(self._ask("get", names=[name]))

    def _put(self, name: str, vector: Array) -> None:
        self._ask("put", [np.asarray(vector)], names=[name])

    @property
    def parameters(self) -> Array:
        return self._get("parameters")

    @parameters.setter
    def parameters(self, vector: Array) -> None:
        self._put("parameters", vector)

    @property
    def velocity(self) -> Array:
        return self._get("velocity")

    @velocity.setter
    def velocity(self, vector: Array) -> None:
        self._put("velocity", vector)

    @property
    def steps(self) -> int:
        """Steps since the initial weights."""
        return int(_number(self._ask("get_steps")))

    @steps.setter
    def steps(self, count: int) -> None:
        self._ask("put_steps", value=int(count))

    def profile(self) -> list[KernelTime]:
        rows = cast(list[dict[str, object]], self._ask("profile").head["rows"])
        return [KernelTime(**row) for row in rows]  # type: ignore[arg-type]

    def synchronize(self) -> None:
        """Wait for everything that the GPU still does for the other process."""
        self._ask("synchronize")

    def close(self) -> None:
        with contextlib.suppress(StageFailed):
            self._ask("close")


class RemoteImages(RemoteEngine, ImageByImage):
    """The same for an engine that takes one image at a time."""

    def train_images(self, order: Order, rates: Array | None = None) -> float:
        return _number(self._ask("train_images", [order, *_perhaps(rates)]))

    @property
    def unfinished(self) -> Array:
        return self._get("unfinished")

    @unfinished.setter
    def unfinished(self, vector: Array) -> None:
        self._put("unfinished", vector)

    def time_update(self) -> float:
        return _number(self._ask("time_update"))


class RemoteLoop(RemoteEngine, OwnLoop):
    """The same for an author's loop, whose checks ask for something else."""

    def prepare(self) -> None:
        raise NotImplementedError("the loop is prepared in its own process")

    def step(self, images: object, labels: object, rate: float) -> object:
        raise NotImplementedError("steps are taken in the loop's own process")

    def forward(self, images: object) -> object:
        raise NotImplementedError("the loop goes forward in its own process")


def _perhaps(rates: Array | None) -> list[AnyArray]:
    return [] if rates is None else [np.asarray(rates)]


def _number(answer: Message) -> float:
    return float(cast(float, answer.head["value"]))


def _vector(answer: Message) -> Array:
    return cast(Array, answer.arrays[0])
