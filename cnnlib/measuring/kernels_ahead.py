"""The kernels that an experiment's runs need, compiled before there is a GPU to run them on.

nvcc takes some ten seconds for a program of stage `tuned`, and a run measures which of up to eight
of them is the fastest. nvcc itself needs no GPU.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

from cnnlib.config import Config
from cnnlib.device.architecture import Architecture
from cnnlib.device.cuda import compile_cubin
from cnnlib.engine import Setup, Stage
from cnnlib.engine.device_engine import DeviceEngine, module_name
from cnnlib.errors import DeviceError, Unsupported
from cnnlib.network import Network
from cnnlib.training.target import setup_for
from cnnlib.validation.trajectory import MOMENTUM


@dataclass(frozen=True)
class Program:
    """One source, and what it is called."""

    name: str
    source: str


def programs(
    config: Config,
    stages: Sequence[Stage],
    networks: Iterable[Network],
    batch_sizes: Sequence[int],
    gpu: Architecture,
) -> tuple[list[Program], dict[str, str]]:
    """All programs that these stages' engines compile on such a GPU, and why some have none.

    The reasons are by stage and network. Programs of the check with a momentum are among them.
    Stages that run no kernels of this project have none, as those of a library.
    """
    found: dict[Program, None] = {}
    reasons: dict[str, str] = {}
    for network in networks:
        for stage in stages:
            if not issubclass(stage.engine, DeviceEngine):
                continue
            for setup in _setups(config, network, batch_sizes):
                try:
                    sources = stage.engine.sources_on(stage, setup, gpu.limits)
                except Unsupported as error:
                    reasons[f"{stage.name}, {network.name}"] = str(error)
                else:
                    name = module_name(stage, setup)
                    found.update(dict.fromkeys(Program(name, source) for source in sources))
    return list(found), reasons


def _setups(config: Config, network: Network, batch_sizes: Sequence[int]) -> Iterator[Setup]:
    """What the engines of a measurement are made for, as far as their sources depend on it."""
    for batch_size in batch_sizes:
        setup = setup_for(config.training, network, batch_size, (0.0, 1.0))
        setup = replace(setup, tune=config.measuring.autotune, device_kind="cuda")
        yield setup
        if not setup.momentum:
            yield replace(setup, momentum=MOMENTUM)


def compile_all(
    due: Sequence[Program], gpu: Architecture, processes: int
) -> Iterator[tuple[Program, str]]:
    """Compile the programs into the cache, so many at a time; yields each as it is done.

    With it comes the first error that the compiler reports, or "". What is there already takes no
    time.
    """
    with ThreadPoolExecutor(processes) as pool:
        begun = {pool.submit(_compiled, each, gpu): each for each in due}
        try:
            for done in as_completed(begun):
                yield begun[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _compiled(program: Program, gpu: Architecture) -> str:
    try:
        compile_cubin(program.source, program.name, gpu.sm)
    except DeviceError as error:
        return str(error)
    return ""
