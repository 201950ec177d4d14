"""Kernels under the sanitizers, and with their threads in both orders, without a GPU.

The stage's process is started with kernels built by the C++ compiler with its address and
undefined-behaviour sanitizers (cnnlib/device/compiler.py), once with fibers in forward order and
once in reverse (cnnlib/device/emulated.py). A wrong index ends the process; a race between threads
or blocks gives other bits.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnnlib.datasets import noise
from cnnlib.device.compiler import sanitizer_environment
from cnnlib.device.emulated import FIBER_ORDERS
from cnnlib.engine import Setup
from cnnlib.errors import DoesNotFit, Unsupported, one_line
from cnnlib.judging.messages import AnyArray
from cnnlib.judging.remote import Worker
from cnnlib.network import Network, parse_layers
from cnnlib.training.loop import start
from cnnlib.training.target import open_engine
from cnnlib.validation.verdicts import ValidationFailed

BATCH = 4
SANITIZED_EXIT = 86
"""Exit code of ASAN_OPTIONS in `sanitizer_environment`."""

_REPORT = re.compile(
    r"(?:ERROR: (?:AddressSanitizer: [^\n]*?)(?= on address| on unknown|\n|$)"
    r"|[^\s:]+:\d+:\d+: runtime error: [^\n]*)"
)
_FRAME = re.compile(r"#\d+ \S+ in (\S+?)(?:\(| )[^\n]*?([^\s/]+\.(?:cuh|cu|hpp|cpp):\d+)")


@dataclass(frozen=True)
class Found:
    """What a check by emulation found on the networks that the stage serves."""

    networks: list[str]
    declined: list[str]


def awkward_networks() -> list[Network]:
    """Networks of sizes that are multiples of nothing, with padding, overlaps and gaps."""
    first = [
        {"conv": {"maps": 7, "kernel": 4}},
        {"activation": "relu"},
        {"subsample": {"size": 2, "method": "max"}},
        {"conv": {"maps": 3, "kernel": 3}},
        {"activation": "tanh"},
        {"dense": 11},
        {"activation": "relu"},
        {"dense": 5},
    ]
    second = [
        {"conv": {"maps": 5, "kernel": 2, "stride": 3}},
        {"conv": {"maps": 4, "kernel": 3}},
        {"activation": "sigmoid"},
        {"subsample": {"size": 2, "method": "mean"}},
        {"dense": 3},
    ]
    third = [
        {"conv": {"maps": 3, "kernel": [2, 5], "stride": [1, 2], "padding": [1, 2]}},
        {"activation": "leaky_relu"},
        {"subsample": {"size": 3, "stride": 2, "padding": 1, "method": "max"}},
        {"dropout": 0.4},
        {"dense": 4},
    ]
    return [
        Network("padded", (2, 11, 14), 4, parse_layers("padded", third)),
        Network("awkward", (3, 17, 13), 5, parse_layers("awkward", first)),
        Network("strided_means", (2, 29, 23), 3, parse_layers("strided_means", second)),
    ]


def check_emulated(name: str, networks: Sequence[Network], folder: Path, limit: float) -> Found:
    """Run steps of the stage with sanitizers in both orders of threads, and compare the bits.

    `folder` gets what the sanitizers print. Raises ValidationFailed with their report, or naming
    the network on which the orders differ; DeviceError where there are no sanitizers.
    """
    environment = sanitizer_environment()
    results: dict[str, dict[str, list[AnyArray]]] = {}
    declined: dict[str, None] = {}
    for order in FIBER_ORDERS:
        log = folder / f"sanitizers-{order}.log"
        env = {**environment, "CNNLIB_FIBER_ORDER": order}
        found: dict[str, list[AnyArray]] = {}
        try:
            with Worker(name, "emulated", env=env, log=log, limit=limit) as worker:
                for each in networks:
                    try:
                        found[each.name] = list(trained(worker, each))
                    except (Unsupported, DoesNotFit) as error:
                        declined[f"{each.name}: {one_line(error)}"] = None
        except Exception:
            if report := sanitizer_report(log):
                raise ValidationFailed(f"stage '{name}', {order} threads: {report}") from None
            raise
        if report := sanitizer_report(log):
            raise ValidationFailed(f"stage '{name}', {order} threads: {report}")
        results[order] = found
    forward, reverse = (results[order] for order in FIBER_ORDERS)
    for each_name, arrays in forward.items():
        for what, one, other in zip(WHAT, arrays, reverse[each_name], strict=True):
            if one.tobytes() != other.tobytes():
                raise ValidationFailed(
                    f"stage '{name}' races on network '{each_name}': {what} changes with the order "
                    "in which threads and blocks run"
                )
    return Found(list(forward), list(declined))


WHAT = ("the loss", "the weights", "the velocity", "a gradient", "the logits")


def trained(worker: Worker, network: Network) -> Iterator[AnyArray]:
    """All that a training, a gradient and an evaluation give: the arrays of WHAT."""
    count = 2 * BATCH
    data = noise("noise", network.input_shape, network.classes, count)
    setup = Setup(network, BATCH, 0.05, momentum=0.5, mean=data.mean, deviation=data.deviation)
    part = BATCH // 2 + 1
    with open_engine(worker.stage, setup, worker.target, data) as engine:
        start(engine, 1)
        yield np.array(engine.train(np.arange(count)))
        yield engine.parameters
        yield engine.velocity
        yield engine.gradient(data.train_images[:part], data.train_labels[:part])[1]
        yield engine.logits(data.train_images[:1])


def sanitizer_report(log: Path) -> str:
    """The first report of a sanitizer in a process's output, in one line; "" if there is none."""
    text = log.read_text(errors="replace") if log.exists() else ""
    found = _REPORT.search(text)
    if not found:
        return ""
    report = found[0].removeprefix("ERROR: ").strip()
    frames: list[tuple[str, str]] = _FRAME.findall(text, found.end())
    # The runtime's own frames lie above and below those of kernels.
    own = [(name, place) for name, place in frames if ".cuh:" in place]
    for name, place in (own or frames)[:1]:
        return f"{report} (in {name}, {place})"
    return report
