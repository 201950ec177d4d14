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
# # A network on arrays of your own, with plots
#
# This file is a notebook: Jupyter with `jupytext`, VS Code, PyCharm and Spyder open it as one, and
# `jupytext --to ipynb examples/notebook.py` converts it. It needs `pip install '.[notebook]'`.

# %%
import matplotlib.pyplot as plt
import numpy as np

import cnnlib

# %% [markdown]
# ## Data
#
# Ten classes of noisy rings: the class is the ring's radius. Images are bytes `(N, height, width)`.

# %%
random = np.random.default_rng(0)
count, size, classes = 3000, 24, 10
labels = random.integers(0, classes, count)
rows, columns = np.mgrid[:size, :size]
centres = random.uniform(9, 14, (count, 2, 1, 1))
distance = np.hypot(rows - centres[:, 0], columns - centres[:, 1])
ring = np.exp(-((distance - (1 + 0.9 * labels[:, None, None])) ** 2))
images = (255 * (0.4 * ring + 0.6 * random.random((count, size, size)))).astype(np.uint8)
train, test = slice(2400), slice(2400, None)

figure, axes = plt.subplots(1, classes, figsize=(12, 1.6))
for label, axis in enumerate(axes):
    axis.imshow(images[labels == label][0], cmap="gray")
    axis.set_title(str(label))
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Network and training
#
# `stage="auto"`, the default, is `tuned` on a GPU and `gemm` on a CPU.

# %%
network = cnnlib.Network.from_layers(
    (1, size, size),
    classes,
    [
        {"conv": {"maps": 8, "kernel": 5}},
        {"activation": "relu"},
        {"subsample": {"size": 2}},
        {"dense": 64},
        {"activation": "relu"},
        {"dense": classes},
    ],
    name="rings",
)
trainer = cnnlib.Trainer(network, batch_size=32, learning_rate=0.05, momentum=0.5)
trainer

# %%
course = list(
    trainer.fit(
        images[train], labels[train], epochs=8, validation_data=(images[test], labels[test])
    )
)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
epochs = [epoch.epoch for epoch in course]
left.plot(epochs, [epoch.loss for epoch in course], label="training")
left.plot(epochs, [epoch.validation_loss for epoch in course], label="validation")
left.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
left.legend()
right.plot(epochs, [epoch.images_per_second for epoch in course], "o-")
right.set(xlabel="epoch", ylabel="images per second", ylim=(0, None))
plt.show()

# %% [markdown]
# ## What it has learned

# %%
found = trainer.predict(images[test])
confusion = np.zeros((classes, classes), int)
np.add.at(confusion, (labels[test], found), 1)
accuracy = trainer.score(images[test], labels[test])

figure, axis = plt.subplots(figsize=(4, 4))
axis.imshow(confusion, cmap="Blues")
axis.set(xlabel="predicted", ylabel="class", title=f"accuracy {accuracy:.3f}")
plt.show()

# %%
filters = network.views(trainer.parameters)[0]["weight"]  # (maps, channels, rows, columns)
figure, axes = plt.subplots(1, len(filters), figsize=(10, 1.5))
for axis, weights in zip(axes, filters, strict=True):
    axis.imshow(weights[0], cmap="coolwarm")
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Keep it

# %%
trainer.save("rings.safetensors")
with cnnlib.Trainer.load("rings.safetensors") as again:
    print(again.score(images[test], labels[test]))
