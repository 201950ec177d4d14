"""Hand a trained network to PyTorch, and take weights that PyTorch has trained.

Without PyTorch this example only says so.
"""

import importlib.util

import numpy as np

import cnnlib

random = np.random.default_rng(3)
labels = random.integers(0, 3, 600)
images = random.integers(0, 150, (600, 1, 16, 16), dtype=np.uint8)
for image, label in zip(images, labels, strict=True):
    image[:, 5 * label : 5 * label + 5] += 100

layers = [{"conv": {"maps": 4, "kernel": 3}}, {"activation": "tanh"}, {"dense": 3}]
network = cnnlib.Network.from_layers((1, 16, 16), 3, layers)
trainer = cnnlib.Trainer(network, batch_size=30, learning_rate=0.05)
list(trainer.fit(images, labels, epochs=2))
logits = trainer.logits(images)

if importlib.util.find_spec("torch") is None:
    print("PyTorch is not installed (pip install torch): logits are not compared")
else:
    import torch

    # With the trainer's normalisation, so that the module takes bytes.
    module = network.to_torch(trainer.parameters, (trainer.mean, trainer.deviation))
    with torch.no_grad():
        theirs = module(torch.from_numpy(images)).numpy()
    print(f"largest difference of logits: {np.abs(theirs - logits).max():.1e}")

    # And back, after the module has learned something else.
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 0.5
        theirs = module(torch.from_numpy(images)).numpy()
    trainer.parameters = network.from_torch(module)
    difference = np.abs(theirs - trainer.logits(images)).max()
    print(f"with the module's weights, largest difference of logits: {difference:.1e}")
