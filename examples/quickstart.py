"""Train, evaluate, predict, save and load a network on two arrays, without a config file."""

import numpy as np

import cnnlib

# 3,000 noisy images (N, height, width) of ten classes: the class is where the bright bar is.
random = np.random.default_rng(0)
labels = random.integers(0, 10, 3000)
images = random.integers(0, 120, (3000, 28, 28), dtype=np.uint8)
for image, label in zip(images, labels, strict=True):
    image[:, 2 * label + 4 : 2 * label + 7] += 80
train, test = slice(2500), slice(2500, None)

network = cnnlib.Network.from_layers(
    (1, 28, 28),
    10,
    [
        {"conv": {"maps": 6, "kernel": 5}},
        {"activation": "relu"},
        {"subsample": {"size": 2}},
        {"dense": 32},
        {"activation": "relu"},
        {"dense": 10},
    ],
)
trainer = cnnlib.Trainer(network, batch_size=50, learning_rate=0.1)
for epoch in trainer.fit(images[train], labels[train], epochs=2):
    print(f"epoch {epoch.epoch}: loss {epoch.loss:.3f}, {epoch.images_per_second:,.0f} images/s")
print(f"accuracy {trainer.evaluate(images[test], labels[test]).accuracy:.3f}")
print("first predictions", trainer.predict(images[test])[:5], "labels", labels[test][:5])

trainer.save("bars.safetensors")
again = cnnlib.Trainer.load("bars.safetensors")
print(f"the loaded network's accuracy {again.score(images[test], labels[test]):.3f}")
