"""Train the same network by two stages: they agree, and one is faster.

Without a GPU the second one's kernels are compiled for the CPU, which shows that they are right and
not how fast they are.
"""

import numpy as np

import cnnlib
from cnnlib.stages import LADDER

random = np.random.default_rng(2)
labels = random.integers(0, 2, 512)
images = random.integers(0, 156, (512, 1, 20, 20), dtype=np.uint8)
images[labels == 1, :, :10] += 100

network = cnnlib.Network.from_layers(
    (1, 20, 20),
    2,
    [
        {"conv": {"maps": 4, "kernel": 3}},
        {"activation": "relu"},
        {"subsample": {"size": 2, "method": "max"}},
        {"dense": 2},
    ],
)

for stage in LADDER:
    print(f"{stage.name:10} {stage.runs_on:5} {stage.change}")

learned = {}
for name, device in (("gemm", "cpu"), ("fused", "emulated")):  # on a GPU: ("fused", "cuda")
    with cnnlib.Trainer(network, stage=name, device=device, batch_size=32) as trainer:
        *_, last = trainer.fit(images, labels, epochs=3)
        print(f"{name} on {trainer.device}: loss {last.loss:.6f}, {last.seconds:.4f} s an epoch")
        learned[name] = trainer.parameters

difference = np.abs(learned["gemm"] - learned["fused"]).max()
print(f"largest difference of {network.parameter_count} parameters: {difference:.1e}")
