# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From kernels to one launch, on a GPU
#
# For a machine with an NVIDIA GPU, your own or a hosted one: stages `gemm_cuda`, `fused`, `ring`
# and `tuned` train the same network. Without a GPU the page runs as well, and says so: kernels
# are then compiled for the processor, which shows that they are right, and not how fast they are.
#
# ## Install
#
# On a hosted machine set `SOURCE` to this repository's address, as pip takes it
# (`git+https://...`), or to the path of a wheel that you have uploaded. PyCUDA is built from
# source, which takes a minute and needs `nvcc`.

# %%
import importlib.util
import subprocess
import sys

SOURCE = ""

if importlib.util.find_spec("cnnlib") is None:
    if not SOURCE:
        raise SystemExit("cnnlib is not installed: set SOURCE to its address or to a wheel")
    install = [sys.executable, "-m", "pip", "install", "-q", f"cnnlib[cuda,notebook] @ {SOURCE}"]
    subprocess.run(install, check=True)

# %% [markdown]
# ## Is there a GPU?

# %%
import math
import os
import statistics
import time

import matplotlib.pyplot as plt
import numpy as np

import cnnlib
from cnnlib.device import open_device
from cnnlib.engine import Setup
from cnnlib.errors import DeviceError
from cnnlib.stages import find_stage

try:
    with open_device("cuda") as gpu:
        print(f"{gpu.name}: what follows is timed on it")
    kind = "cuda"
except DeviceError as problem:
    print(f"NO GPU: {problem}.")
    print("Kernels are emulated on the processor. No times are shown: they would say nothing.")
    kind = "emulated"
    os.environ.setdefault("CNNLIB_OPTIMIZE", "1")  # compiles faster

# %% [markdown]
# ## A network and images
#
# On a GPU it is LeNet-5 on 28 x 28 pixels; emulated, a small one. The images are noise: for times
# it does not matter what is on them.

# %%
on_gpu = kind == "cuda"
size, batch, count = (28, 64, 60_000) if on_gpu else (12, 8, 32)
layers = [
    {"conv": {"maps": 6, "kernel": 5, "padding": 2}},
    {"activation": "relu"},
    {"subsample": 2},
    {"conv": {"maps": 16, "kernel": 5}},
    {"activation": "relu"},
    {"subsample": 2},
    {"dense": 120},
    {"activation": "relu"},
    {"dense": 84},
    {"activation": "relu"},
    {"dense": 10},
]
if not on_gpu:
    layers = [{"conv": {"maps": 2, "kernel": 3}}, *layers[1:3], {"dense": 10}]
network = cnnlib.Network.from_layers((1, size, size), 10, layers, name="noise")
random = np.random.default_rng(0)
images = random.integers(0, 256, (count, 1, size, size), dtype=np.uint8)
labels = random.integers(0, 10, count).astype(np.uint8)

# %% [markdown]
# ## Four stages
#
# Each trains the same steps. First the losses, which have to agree but for rounding; then the
# number of kernel launches of a step; then, on a GPU, the time of an epoch: the median of five,
# after one that is not counted.

# %%
stages = ("gemm_cuda", "fused", "ring", "tuned")
losses, launches, epochs = {}, {}, {}
for name in stages:
    stage = find_stage(name, "this notebook")
    setup = Setup(network, batch, learning_rate=0.01, mean=127.5, deviation=74.0)
    with open_device(kind) as device, stage.engine(stage, setup, device) as engine:
        engine.parameters = network.initial_parameters(1)
        engine.load(images, labels)
        order = np.arange(count // batch * batch)
        losses[name] = engine.train(order)
        launches[name] = sum(row.launches for row in engine.profile())
        times = []
        for _ in range(5 if on_gpu else 0):
            began = time.perf_counter()
            engine.train(order)
            times.append(time.perf_counter() - began)
        epochs[name] = statistics.median(times) if times else math.nan
    shown = f"{1e3 * epochs[name]:.2f} ms an epoch" if on_gpu else "no GPU: no time"
    print(f"{name:10} loss {losses[name]:.6f}  {launches[name]:3} launches a step  {shown}")

# %% [markdown]
# `gemm_cuda` launches a kernel for every operation, and every map goes to device memory and back.
# `fused` and `ring` take a convolution with its activation and subsampling in one. `profile`
# names the parts of a step of `tuned`, which are sections of two launches, so its number here is
# one of parts.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
colors = [find_stage(name, "this notebook").color for name in stages]
left.barh(stages, [launches[name] for name in stages], color=colors)
left.invert_yaxis()
left.set(xlabel="kernels or parts of a step")
if on_gpu:
    right.barh(stages, [1e3 * epochs[name] for name in stages], color=colors)
    right.invert_yaxis()
    right.set(xlabel="milliseconds an epoch")
else:
    right.text(0.5, 0.5, "no GPU: no times", ha="center", va="center")
    right.axis("off")
plt.show()

# %% [markdown]
# ## Questions
#
# 1. Which stage gains most over the one before it on this GPU? Compare with the published H100.
# 2. Change `batch` to 1024. Which gains shrink, and why?
# 3. A launch costs some microseconds. How much of `gemm_cuda`'s epoch is that, and how do you know?
#
# Then write the kernels yourself; a check needs no GPU:
#
#     cnnlib exercise start gemm_cuda
#     cnnlib exercise start fused
#     cnnlib exercise start ring
