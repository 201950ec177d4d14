"""PyTorch and JAX, which run the same training in their usual ways and are measured alike.

Each peer is a Stage like any other, with an engine that calls the library. Where the library is not
installed, or a peer needs a GPU and there is none, its runs are `unavailable`.
"""

from dataclasses import replace

from cnnlib.engine import Stage
from cnnlib.peers import jax, pytorch

TF32 = 2.0**-10
"""Relative rounding of a factor that tensor cores multiply as TF32."""

CHOSEN = 8.0
"""Slack for libraries that choose the fastest algorithm for a convolution. Winograd's and those by
Fourier transforms are among them, which sum larger numbers that cancel.
"""

WINOGRAD = 64.0
"""Slack for the gradient of a convolution's weights. There cuDNN takes Winograd's algorithm with
tiles of 9x9 for kernels of 5x5 (winogradWgradDelta9x9_5x5 in PyTorch's trace) as float32: errors of
2e-4 of the largest element where those of all other gradients are 4e-7, up to 42 times the bound of
a plain sum. Seen on an H100 in PyTorch at a batch of 132 and in JAX at 32; in JAX at 16 another
algorithm is as coarse.
"""

GREY = "#919191"
"""All libraries are grey in figures, which tell them apart by their marks and dashes."""

TORCH = Stage(
    name="torch",
    title="PyTorch",
    change="PyTorch as it comes: a call for every operation, data on the device",
    runs_on="any",
    engine=pytorch.TorchEngine,
    operators=pytorch.OPERATORS,
    # cuDNN sums some gradients by atomic additions
    repeatable=False,
    slack=CHOSEN,
    conv_weight_slack=WINOGRAD,
    color=GREY,
    marker="<",
)
TORCH_GRAPH = replace(
    TORCH,
    name="torch_graph",
    title="PyTorch, graph",
    change="PyTorch with the whole step in one CUDA graph",
    options=pytorch.TorchOptions(graph="always"),
    color=GREY,
    marker=">",
)
TORCH_COMPILE = replace(
    TORCH,
    name="torch_compile",
    title="PyTorch, compiled",
    change="torch.compile, and on a GPU the whole step in one CUDA graph",
    options=pytorch.TorchOptions(compile=True, graph="on a GPU"),
    color=GREY,
    marker="p",
)
JAX = Stage(
    name="jax",
    title="JAX",
    change="JAX with a whole epoch in one jitted scan, in the better of two layouts",
    runs_on="any",
    engine=jax.JaxEngine,
    operators=jax.OPERATORS,
    # an epoch and a part of one are two programs, which may sum in different orders
    repeatable=False,
    slack=CHOSEN,
    conv_weight_slack=WINOGRAD,
    color=GREY,
    marker="X",
)
PEERS: tuple[Stage, ...] = (
    TORCH,
    TORCH_GRAPH,
    TORCH_COMPILE,
    replace(
        TORCH_COMPILE,
        name="torch_compile_tf32",
        title="PyTorch, compiled, TF32",
        change="the same with products in TF32",
        rounding=TF32,
        color=GREY,
        marker="h",
    ),
    JAX,
    replace(
        JAX,
        name="jax_tf32",
        title="JAX, TF32",
        change="the same with products in TF32",
        rounding=TF32,
        color=GREY,
        marker="d",
    ),
)
