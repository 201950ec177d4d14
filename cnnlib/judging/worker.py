"""The process in which a stage that is judged runs: `python -m cnnlib.judging.worker SOCKET`.

It does what it is asked over the socket, one request after the other, and decides nothing: it holds
no clock and makes no check. The stage's module is imported here alone.
"""

import dataclasses
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress

import numpy as np

from cnnlib.device.emulated import EmulatedDevice
from cnnlib.engine import Engine, ImageByImage, OwnLoop, Setup, Stage
from cnnlib.engine.device_engine import DeviceEngine
from cnnlib.engine.shuffle import Shuffle
from cnnlib.errors import UserError, one_line
from cnnlib.judging.messages import AnyArray, Head, Message, receive, send
from cnnlib.network import Network, parse_layers
from cnnlib.stages import find_stage, forget
from cnnlib.system.processes import die_with_parent
from cnnlib.training.target import Target, open_engine, open_target

Answer = tuple[Head, list[AnyArray]]

GIVEN = ("name", "title", "change", "runs_on", "rounding", "slack", "conv_weight_slack")
"""Fields of a Stage that are passed on as they are, with those of PLAIN."""
PLAIN = ("repeatable", "threads", "color", "marker")
VECTORS = ("parameters", "velocity", "unfinished")


class Worker:
    """The stage, its device and its engines, by the numbers that the judge gives them."""

    def __init__(self, opened: ExitStack) -> None:
        self._opened = opened
        self._stage: Stage
        self._target: Target
        self._engines: dict[int, tuple[ExitStack, Engine]] = {}

    def answer(self, asked: Message) -> Answer:
        """Do what a message asks for; raises whatever the stage does."""
        head, arrays = asked
        call: Callable[[Head, list[AnyArray]], Answer] = getattr(self, f"do_{head['do']}")
        return call(head, arrays)

    def do_describe(self, head: Head, arrays: list[AnyArray]) -> Answer:
        stage = find_stage(str(head["stage"]), str(head["where"]))
        kernels = isinstance(stage.engine, type) and issubclass(stage.engine, DeviceEngine)
        said: Head = {name: getattr(stage, name) for name in (*GIVEN, *PLAIN)}
        said |= {
            "dtype": np.dtype(stage.dtype).name,
            "by_image": issubclass(stage.engine, ImageByImage),
            "loop": issubclass(stage.engine, OwnLoop),
            "engine": stage.engine.__name__,
            "kernels": kernels,
        }
        self._stage = stage
        return said, []

    def do_target(self, head: Head, arrays: list[AnyArray]) -> Answer:
        self._target = self._opened.enter_context(open_target(self._stage, str(head["device"])))
        target = self._target
        return {"name": target.name, "kind": target.kind, "pci_bus_id": target.pci_bus_id}, []

    def do_open(self, head: Head, arrays: list[AnyArray]) -> Answer:
        stack = ExitStack()
        engine = stack.enter_context(open_engine(self._stage, setup_from(head), self._target))
        self._engines[int(str(head["engine"]))] = stack, engine
        served = [str(text) for text in engine.served]
        return {"served": served, "choices": _plain(dict(engine.choices))}, []

    def do_close(self, head: Head, arrays: list[AnyArray]) -> Answer:
        stack, _ = self._engines.pop(int(str(head["engine"])))
        stack.close()
        return {}, []

    def do_load(self, head: Head, arrays: list[AnyArray]) -> Answer:
        images, labels = arrays
        self._engine(head).load(images, labels)  # type: ignore[arg-type]
        return {}, []

    def do_train(self, head: Head, arrays: list[AnyArray]) -> Answer:
        order, *rates = arrays
        engine = self._engine(head)
        return _trained(engine, lambda: engine.train(order, rates[0] if rates else None))  # type: ignore[arg-type]

    def do_train_epoch(self, head: Head, arrays: list[AnyArray]) -> Answer:
        tables, *rates = arrays
        shuffle = Shuffle.given(int(str(head["count"])), tables)
        engine = self._engine(head)
        return _trained(engine, lambda: engine.train_epoch(shuffle, rates[0] if rates else None))

    def do_train_images(self, head: Head, arrays: list[AnyArray]) -> Answer:
        order, *rates = arrays
        engine = self._engine(head)
        assert isinstance(engine, ImageByImage)
        return {"value": float(engine.train_images(order, rates[0] if rates else None))}, []  # type: ignore[arg-type]

    def do_time_update(self, head: Head, arrays: list[AnyArray]) -> Answer:
        engine = self._engine(head)
        assert isinstance(engine, ImageByImage)
        return {"value": float(engine.time_update())}, []

    def do_gradient(self, head: Head, arrays: list[AnyArray]) -> Answer:
        images, labels = arrays
        loss, gradient = self._engine(head).gradient(images, labels)  # type: ignore[arg-type]
        return {"value": float(loss)}, [np.asarray(gradient)]

    def do_backward(self, head: Head, arrays: list[AnyArray]) -> Answer:
        images, errors = arrays
        return {}, [np.asarray(self._engine(head).backward(images, errors))]  # type: ignore[arg-type]

    def do_logits(self, head: Head, arrays: list[AnyArray]) -> Answer:
        return {}, [np.asarray(self._engine(head).logits(arrays[0]))]  # type: ignore[arg-type]

    def do_get(self, head: Head, arrays: list[AnyArray]) -> Answer:
        """Several vectors of an engine at once, in the order in which they are named."""
        engine = self._engine(head)
        return {}, [np.asarray(getattr(engine, _vector(name))) for name in _names(head)]

    def do_put(self, head: Head, arrays: list[AnyArray]) -> Answer:
        engine = self._engine(head)
        for name, vector in zip(_names(head), arrays, strict=True):
            setattr(engine, _vector(name), vector)
        return {}, []

    def do_get_steps(self, head: Head, arrays: list[AnyArray]) -> Answer:
        return {"value": int(self._engine(head).steps)}, []

    def do_put_steps(self, head: Head, arrays: list[AnyArray]) -> Answer:
        self._engine(head).steps = int(str(head["value"]))
        return {}, []

    def do_profile(self, head: Head, arrays: list[AnyArray]) -> Answer:
        return {"rows": [_plain(row._asdict()) for row in self._engine(head).profile()]}, []

    def do_synchronize(self, head: Head, arrays: list[AnyArray]) -> Answer:
        """Wait for whatever the GPU still does, on any stream of any library loaded here."""
        if self._target.device is not None:
            self._target.device.synchronize()
        for name in ("torch", "cupy"):
            cuda = getattr(sys.modules.get(name), "cuda", None)
            with suppress(Exception):  # a library without a GPU
                if name == "torch" and cuda is not None and cuda.is_initialized():
                    cuda.synchronize()
                elif name == "cupy" and cuda is not None:
                    cuda.Device().synchronize()
        return {}, []

    def do_clocks(self, head: Head, arrays: list[AnyArray]) -> Answer:
        clocks = (time.perf_counter(), time.monotonic(), time.time())
        return {"clocks": [float(clock) for clock in clocks]}, []

    def do_forget(self, head: Head, arrays: list[AnyArray]) -> Answer:
        """Forget the stage, so that another version of its file can be described."""
        forget()
        return {}, []

    def do_watched(self, head: Head, arrays: list[AnyArray]) -> Answer:
        """What the kernels of a watched device have done since this was last asked."""
        device = self._target.device
        watched = device.watched if isinstance(device, EmulatedDevice) else {}
        kernels = {name: dataclasses.asdict(each) for name, each in watched.items()}
        watched.clear()
        return {"kernels": kernels}, []

    def do_nothing(self, head: Head, arrays: list[AnyArray]) -> Answer:
        return {}, []

    def _engine(self, head: Head) -> Engine:
        return self._engines[int(str(head["engine"]))][1]


def setup_from(head: Head) -> Setup:
    """The setup that a message describes; its network is {name, input_shape, classes, layers}."""
    given = dict(head["setup"])  # type: ignore[call-overload]
    network = given.pop("network")
    layers = parse_layers(network["name"], network["layers"])
    shape = tuple(network["input_shape"])
    built = Network(network["name"], shape, network["classes"], layers)
    values: dict[str, object] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    return Setup(network=built, **values)  # type: ignore[arg-type]


def setup_as_values(setup: Setup) -> Head:
    """What `setup_from` reads, of values that JSON can hold."""
    network = setup.network
    values: Head = {
        field.name: getattr(setup, field.name)
        for field in dataclasses.fields(setup)
        if field.name != "network"
    }
    values["network"] = {
        "name": network.name,
        "input_shape": list(network.input_shape),
        "classes": network.classes,
        "layers": [{layer.kind: layer.model_dump(mode="json")} for layer in network.layers],
    }
    return values


def _trained(engine: Engine, call: Callable[[], float]) -> Answer:
    loss = float(call())
    losses = engine.step_losses
    return {"value": loss}, [] if losses is None else [np.asarray(losses)]


def _names(head: Head) -> list[str]:
    return [str(name) for name in head["names"]]  # type: ignore[attr-defined]


def _vector(name: str) -> str:
    if name not in VECTORS:
        raise ValueError(f"no vector is called {name!r}")
    return name


def _plain(values: dict[str, object]) -> dict[str, object]:
    """Values as JSON has them: numpy's numbers become Python's, anything else its text."""
    plain: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, np.generic):
            value = value.item()
        plain[name] = value if isinstance(value, str | int | float | bool | None) else str(value)
    return plain


def main(path: str, *, under_a_tool: bool) -> None:
    """Answer the judge at this socket until it goes away."""
    if not under_a_tool:  # whose thread that has started this process may end before it
        die_with_parent()
    judge = socket.socket(socket.AF_UNIX)
    judge.connect(path)
    with ExitStack() as opened, judge:
        worker = Worker(opened)
        while True:
            try:
                asked = receive(judge)
            except EOFError:
                return
            try:
                head, arrays = worker.answer(asked)
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                text = one_line(error) if isinstance(error, UserError | OSError) else str(error)
                head, arrays = {"raised": type(error).__name__, "text": text}, []
                head["kinds"] = [kind.__name__ for kind in type(error).__mro__]
            send(judge, head, arrays)


if __name__ == "__main__":
    main(sys.argv[1], under_a_tool=sys.argv[2:] == ["under-a-tool"])
