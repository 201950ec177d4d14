"""An engine for as long as its user wants it: made when needed, and safe to interrupt."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController, threadpool_limits

from cnnlib.engine import Bytes, Engine, Setup, Stage
from cnnlib.engine.image_by_image import continue_step, unfinished_of
from cnnlib.errors import ConfigError, Unsupported
from cnnlib.layers import Array
from cnnlib.system.interrupts import Stopped
from cnnlib.training.checkpoint import State
from cnnlib.training.fit import interrupt_noted
from cnnlib.training.loop import Epoch, train_epochs
from cnnlib.training.target import check_supported, engine_on, open_target, threads_of


class Session:
    """The state of a training by `stage`, in an engine once there is one.

    Threads are limited to the stage's while it computes, and only then: the limit is one of the
    whole process. Raises DeviceError when the device is not there.
    """

    def __init__(self, stage: Stage, device: str, parameters: Array) -> None:
        self.stage = stage
        self.epochs = 0
        """Epochs that have been trained."""
        self._parameters = np.array(parameters, stage.dtype)
        self._velocity = np.zeros_like(self._parameters)
        self._steps = 0
        self._engine: Engine | None = None
        self._newest: object = None
        self._process = os.getpid()
        self._resources = ExitStack()
        with threadpool_limits(threads_of(stage)):
            self.target = self._resources.enter_context(open_target(stage, device))

    @property
    def parameters(self) -> NDArray[np.floating]:
        """Copy of the flat parameter vector, of the stage's dtype."""
        return self._parameters.copy() if self._engine is None else self._engine.parameters

    @parameters.setter
    def parameters(self, vector: Array) -> None:
        """The velocity begins anew; steps go on."""
        self._steps = self.steps
        self._parameters = vector.astype(self.stage.dtype)
        self._velocity = np.zeros_like(self._parameters)
        if self._engine is not None:
            self._give_state(self._engine)

    @property
    def steps(self) -> int:
        """Steps since the initial weights, by which dropout's masks are drawn."""
        return self._steps if self._engine is None else self._engine.steps

    @steps.setter
    def steps(self, count: int) -> None:
        self._steps = count
        if self._engine is not None:
            self._engine.steps = count

    def logits(self, setup: Setup, images: Bytes) -> Array:
        """(n, classes) for any number n of images."""
        engine = self._opened(setup)
        with self._threads.limit(limits=threads_of(self.stage)):
            return engine.logits(images)

    def train(
        self,
        setup: Setup,
        images: Bytes,
        labels: Bytes,
        epochs: int,
        seed: int,
        report: Callable[[State, int], None],
    ) -> Iterator[Epoch]:
        """Train for more epochs: what Trainer.fit says, the engine being made of `setup`."""
        engine, asked = self._opened(setup), _never
        self._newest = current = object()
        trained = train_epochs(
            engine,
            len(labels),
            epochs,
            seed,
            before=self.epochs,
            report=_between_steps(report),
            stop=lambda: asked(),
            at_once=True,
        )
        for epoch in range(epochs):
            if self._newest is not current:
                raise ConfigError("this fit is over: the trainer was closed or fitted again")
            with self._threads.limit(limits=threads_of(self.stage)), self._consistent(engine):
                if epoch == 0:
                    engine.load(images, labels)
                with interrupt_noted() as asked:
                    done = next(trained)
            self.epochs += 1
            if asked():  # during an epoch that was trained at once
                raise KeyboardInterrupt
            yield done
            if done.diverged:
                return

    def keep(self) -> None:
        """Read the state from the engine, if there is one, to have it after `close`."""
        if self._engine is not None:
            self._keep_state(self._engine)

    def close(self) -> None:
        """Give back the device; nothing is read from it, which may be gone when a program ends."""
        if os.getpid() != self._process:
            return  # a copy in a forked process must not end the processes of the original's engine
        self._drop_engine()
        self._resources.close()

    def _opened(self, setup: Setup) -> Engine:
        """The engine, with the state so far; every call has the same `setup`."""
        if self._engine is None:
            with threadpool_limits(threads_of(self.stage)):
                engine = engine_on(self.target, self.stage, setup)
            self._give_state(engine)
            self._at_rest = unfinished_of(engine)
            # After libraries have been loaded, so that it knows their threads.
            self._threads = ThreadpoolController()
            self._engine = engine
        return self._engine

    @contextmanager
    def _consistent(self, engine: Engine) -> Iterator[None]:
        """Leave whole steps behind, however the body of the context ends.

        Where that was between two steps the engine keeps what it has learned. Otherwise a new one
        will be made with the state before: this one's processes or device may be in the middle of
        something.
        """
        try:
            yield
        except (Stopped, _CallbackError) as error:
            continue_step(engine, self._at_rest)
            self._keep_state(engine)
            if isinstance(error, _CallbackError):
                raise error.raised from None
            raise KeyboardInterrupt from None
        except BaseException:
            self._drop_engine()
            raise
        self._keep_state(engine)

    def _keep_state(self, engine: Engine) -> None:
        self._parameters, self._velocity = engine.parameters, engine.velocity
        self._steps = engine.steps

    def _give_state(self, engine: Engine) -> None:
        engine.parameters, engine.velocity = self._parameters, self._velocity
        engine.steps = self._steps

    def _drop_engine(self) -> None:
        engine, self._engine, self._newest = self._engine, None, None
        if engine is not None:
            engine.close()


def open_session(stages: Sequence[Stage], device: str, setup: Setup, parameters: Array) -> Session:
    """A session of the first of these stages that can train what `setup` says on the device.

    Raises what the first one says if none can: Unsupported.
    """
    refused: list[Unsupported] = []
    for stage in stages:
        with ExitStack() as unless_kept:
            session = Session(stage, device, parameters)
            unless_kept.callback(session.close)
            try:
                check_supported(session.target, stage, setup)
            except Unsupported as error:
                refused.append(error)
                continue
            unless_kept.pop_all()
            return session
    raise refused[0]


class _CallbackError(Exception):
    """What a callback has raised, between two steps."""

    def __init__(self, raised: BaseException) -> None:
        super().__init__()
        self.raised = raised


def _between_steps(report: Callable[[State, int], None]) -> Callable[[State, int], None]:
    """`report`, with what it raises as a _CallbackError."""

    def reporting(state: State, steps: int) -> None:
        try:
            report(state, steps)
        except BaseException as error:
            raise _CallbackError(error) from None

    return reporting


def _never() -> int:
    return 0
