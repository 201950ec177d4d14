"""From the arrays that one has to those that a network takes, with progress and validation."""

import numpy as np

import cnnlib

# What a reader of colour pictures may give: numbers from 0 to 1, channels last, labels as words.
random = np.random.default_rng(1)
names = np.array(["blue", "green", "red"])
words = random.choice(names, 600)
pictures = random.random((600, 16, 16, 3)) * 0.9
for picture, word in zip(pictures, words, strict=True):
    picture[4:12, 4:12, ["red", "green", "blue"].index(word)] += 0.1

# Channels come first in cnnlib, as in PyTorch. Classes are numbered from 0 on.
images = pictures.transpose(0, 3, 1, 2)
classes, labels = np.unique(words, return_inverse=True)

# Floating-point images are rounded to the 256 levels of a byte. These numbers, in units of bytes,
# normalise all channels alike; without them each channel has a mean and a deviation of its own.
mean, deviation = 255 * images.mean(), 255 * images.std()

network = cnnlib.Network.from_layers(
    (3, 16, 16),
    len(classes),
    [
        cnnlib.Conv(maps=8, kernel=3),
        cnnlib.Activation(function="tanh"),
        cnnlib.Subsample(size=2, method="mean"),
        cnnlib.Dense(units=len(classes)),
    ],
    name="colours",
)
with cnnlib.Trainer(
    network,
    batch_size=32,
    learning_rate=0.01,
    momentum=0.9,
    mean=mean,
    deviation=deviation,
    class_names=classes.tolist(),
    seed=7,
) as trainer:
    held_back = images[500:], labels[500:]

    def show(progress: cnnlib.Progress) -> None:
        """Called about every second, and at the end of each epoch."""
        print(f"  epoch {progress.epoch}: {progress.step} of {progress.steps} steps")

    for epoch in trainer.fit(
        images[:500], labels[:500], epochs=10, validation_data=held_back, callback=show
    ):
        print(f"epoch {epoch.epoch}: validation accuracy {epoch.validation_accuracy:.2f}")
        if epoch.validation_accuracy > 0.96:
            break  # leaving the loop ends the training
    probabilities = trainer.predict_proba(images[:1])[0]
    for name, probability in zip(classes, probabilities, strict=True):
        print(f"{name}: {probability:.3f}")

# Errors are exceptions with one line that names the argument and says what is expected.
try:
    cnnlib.Trainer(network, mean=0, deviation=1).predict(pictures)
except ValueError as error:
    print(f"{type(error).__name__}: {error}")
