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
# # From plain loops to matrix products
#
# The first two rungs of the ladder, on a CPU and on images that are drawn here: nothing is
# downloaded, and the whole page takes less than a minute. It needs `pip install '.[notebook]'`.
#
# You will write a convolution by loops, see how long it takes, make a product of matrices of it,
# and let the library train by both. Guess before you run a cell: by what factor will it differ?

# %%
import statistics
import time

import matplotlib.pyplot as plt
import numpy as np

import cnnlib

random = np.random.default_rng(0)


def seconds(call, repeats=5):
    """The median time of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


# %% [markdown]
# ## Images
#
# Four classes: a bright bar at one of four places, in noise.

# %%
count, size, classes = 640, 16, 4
labels = random.integers(0, classes, count)
images = random.integers(0, 120, (count, size, size), dtype=np.uint8)
for image, label in zip(images, labels):
    image[4 * label : 4 * label + 3, 3:13] += 100

figure, axes = plt.subplots(1, classes, figsize=(8, 2))
for label, axis in enumerate(axes):
    axis.imshow(images[labels == label][0], cmap="gray")
    axis.set_title(str(label))
    axis.axis("off")
plt.show()

# %% [markdown]
# ## One convolution by loops
#
# `target[m, y, x] = bias[m] + sum of weight[m] times the window at (y, x)`, for six maps of 5 x
# 5.

# %%
source = images[0][np.newaxis] / 255.0
weight, bias = random.normal(0, 0.2, (6, 1, 5, 5)), random.normal(0, 0.1, 6)


def by_loops():
    across = size - 5 + 1
    target = np.empty((6, across, across))
    for m in range(6):
        for y in range(across):
            for x in range(across):
                target[m, y, x] = np.sum(weight[m] * source[:, y : y + 5, x : x + 5]) + bias[m]
    return target


loops = seconds(by_loops)
outputs = 6 * (size - 4) ** 2
print(f"{1e3 * loops:.2f} ms for {outputs} outputs, {1e6 * loops / outputs:.1f} us each")

# %% [markdown]
# An output takes 25 multiplications and 25 additions: some nanoseconds of work for a processor.
# Where do the microseconds go?
#
# ## The same as a product of matrices
#
# Every window becomes a column (im2col). Then all outputs of all maps are one product, which BLAS
# does. Windows overlap, so elements are copied up to 25 times: more memory for less time.


# %%
def by_a_product():
    windows = np.lib.stride_tricks.sliding_window_view(source[0], (5, 5))
    columns = windows.reshape(-1, 25).T  # (25, positions): a copy
    return (weight.reshape(6, 25) @ columns + bias[:, None]).reshape(6, *windows.shape[:2])


product = seconds(by_a_product, 50)
print(f"largest difference {np.abs(by_loops() - by_a_product()).max():.1e}")
print(f"{1e6 * product:.0f} us: {loops / product:.0f} times as fast")

# %% [markdown]
# ## The stages of the library
#
# Stage `naive` has these loops for every layer, forward and back, one image at a time. Stage
# `gemm` has products of matrices, for many images at once. They train the same network on the
# same images in the same order.

# %%
network = cnnlib.Network.from_layers(
    (1, size, size),
    classes,
    [
        {"conv": {"maps": 6, "kernel": 5}},
        {"activation": "tanh"},
        {"subsample": 2},
        {"dense": classes},
    ],
    name="bars",
)

each, learned = {}, {}
for stage in ("naive", "gemm"):
    with cnnlib.Trainer(network, stage=stage, batch_size=32, learning_rate=0.05) as trainer:
        (epoch,) = trainer.fit(images[:64], labels[:64], epochs=1)
        learned[stage] = trainer.parameters
        if stage == "gemm":  # so few images say little about its time
            *_, epoch = trainer.fit(images, labels, epochs=5)
        each[stage] = epoch.seconds / epoch.images
        print(f"{stage:6} {1e6 * each[stage]:8.1f} us an image")
print(f"gemm is {each['naive'] / each['gemm']:,.0f} times as fast")

# %% [markdown]
# ## Do they compute the same?
#
# A fast wrong answer is worth nothing. Both have trained on the same 64 images first; their
# weights after that are compared.

# %%
difference = np.abs(learned["naive"] - learned["gemm"]).max()
print(f"largest difference of {network.parameter_count} weights: {difference:.1e}")

# %% [markdown]
# ## What a batch is worth
#
# A product of larger matrices uses the processor better, and a call of Python is shared by more
# images. Work for each image stays the same.

# %%
batches = (4, 16, 64, 256)
times = []
for batch in batches:
    with cnnlib.Trainer(network, stage="gemm", batch_size=batch, learning_rate=0.05) as trainer:
        course = list(trainer.fit(images, labels, epochs=5))
        times.append(statistics.median(epoch.seconds / epoch.images for epoch in course[1:]))
flops = 3 * sum(network.forward_flops)  # going back takes about twice as many as going forward

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.bar(list(each), [1e6 * value for value in each.values()], color=["#5c5c5c", "#0072b2"])
left.set(yscale="log", ylabel="microseconds an image")
right.plot(batches, [flops / value / 1e9 for value in times], "s-", color="#0072b2")
right.set(xscale="log", xlabel="batch size", ylabel="GFLOP/s of stage gemm", ylim=(0, None))
right.set_xticks(batches, [str(batch) for batch in batches])
right.minorticks_off()
plt.show()

# %% [markdown]
# ## Questions
#
# 1. By which factor did you expect `gemm` to win, and where does the rest come from?
# 2. `by_a_product` copies each element up to 25 times. Why does it win all the same?
# 3. Why does the rate rise with the batch, and why does it stop rising?
#
# Then write both yourself:
#
#     cnnlib exercise start naive
#     cnnlib exercise start gemm
