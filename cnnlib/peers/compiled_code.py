"""Where PyTorch and JAX keep code that they have compiled, so that the next process has it."""

import gc
import os
import sys
from pathlib import Path

from cnnlib.system.machine import usable_cores


def keep_compiled_code(folder: Path, processes: int) -> None:
    """Have this process's children keep compiled code in `folder`, compiling so many at a time.

    Variables of the environment that are set already stay as they are. XLA's own cache of the
    times of algorithms stays off: some are taken where nothing is alone on its GPU.
    """
    for name, value in {
        "TORCHINDUCTOR_CACHE_DIR": folder / "inductor",
        "TORCHINDUCTOR_COMPILE_THREADS": max(1, usable_cores() // processes),
        "TRITON_CACHE_DIR": folder / "triton",
        "JAX_COMPILATION_CACHE_DIR": folder / "jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }.items():
        os.environ.setdefault(name, str(value))


def forget_compiled_code() -> None:
    """Let go of what PyTorch and JAX have compiled in this process, once its engine is closed.

    What is kept on disk stays. PyTorch compiles a function of one engine only so many times.
    """
    gc.collect()
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()
    if (jax := sys.modules.get("jax")) is not None:
        jax.clear_caches()
