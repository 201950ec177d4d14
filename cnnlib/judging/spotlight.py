"""One step that matters among many that vanish, at a random place of a call of full length.

The weights must end where this step alone leads, wherever it is: all other steps are too short for
float32 to show. Nothing has to be replayed, so that this holds for stages that do not repeat their
bits, too.

How far off a stage may be whose products are coarser than float32 is measured for the network and
the batch, parameter by parameter: see cnnlib/validation/coarse.py. Further coarse references are
asked until one explains what the stage is off by, or there have been MOST_COARSE of them. A single
decision of relu or max now and then moves a gradient further than in all of these. A call that such
a stage fails is therefore made again, with the same place in the spotlight, other weights and other
images, and the second verdict counts.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from cnnlib.datasets import Dataset
from cnnlib.engine import Bytes, Engine, Order, Setup, Stage
from cnnlib.engine.shuffle import Shuffle
from cnnlib.layers import Array, Dropout
from cnnlib.training.target import Target, open_engine
from cnnlib.validation.coarse import coarse_reference, length
from cnnlib.validation.reference import Referee
from cnnlib.validation.steps import compare_loss
from cnnlib.validation.tolerances import (
    COARSE_STEPS,
    MOST_AMBIGUITY,
    SPREAD,
    further_slack,
    gradient_bound,
    is_conv_weight,
    machine_epsilon,
)
from cnnlib.validation.verdicts import ValidationFailed, failure, unjudged

DIM = 1e-10
"""Learning rates of the steps outside the spotlight, as shares of the one in it: too small for
float32 to show, and not zero, which a stage might look for."""
BRIGHT = 0.3
"""Length of the step in the spotlight as a share of that of the weights."""
SPOTLIGHTS = 4
POOL = 256
"""Images at most among which those are looked for that have no near-ties of relu or max."""
MOST_COARSE = 16
"""Coarse references that are asked before a stage of less precision fails a call. With 4, honest
TF32 failed 3 % of the calls on shipped networks, with 16 it failed 2 of 624."""


class Spotlight:
    """A training set without near-ties, weights, and what one step from them does."""

    def __init__(self, engine: Engine, dataset: Dataset, random: np.random.Generator) -> None:
        """Draw weights and images, and have the engine load the images."""
        self.engine, self._random = engine, random
        setup = engine.setup
        chosen = random.permutation(len(dataset.train_labels))[:POOL]
        weights = engine.network.initial_parameters(int(random.integers(2**31)))
        with Referee(setup) as referee:
            referee.parameters = weights.astype(np.float64)
            images, tied = referee.avoid_near_ties(dataset.train_images[chosen])
            self.weights = referee.parameters.astype(engine.stage.dtype)
        clean = np.setdiff1d(np.arange(len(images)), tied)
        if not len(clean):
            raise unjudged(
                engine, "all images have near-ties of relu or max", "fewer layers, tanh for relu"
            )
        self._distinct = len(clean)
        again = np.resize(clean, len(dataset.train_labels))
        self.images: Bytes = images[again]
        self.labels: Bytes = dataset.train_labels[chosen][again]
        engine.load(self.images, self.labels)

    def check(self, by_epoch: bool, place: int) -> None:
        """One call in which one step matters, number `place` from 0.

        Raises ValidationFailed or Unjudged.
        """
        engine, random = self.engine, self._random
        count, size = len(self.labels), engine.setup.batch_size
        steps = count // size
        shuffle = Shuffle(count, int(random.integers(2**31)), int(random.integers(1, 100)))
        order = shuffle.indices()[: steps * size]
        batch = order[place * size : (place + 1) * size]
        last = place == steps - 1
        with Referee(engine.setup) as referee:
            referee.parameters = self.weights.astype(np.float64)
            gradient = referee.reference.gradient(self.images[batch], self.labels[batch])[1]
            # Until the last step the weights stay, so that all losses are known.
            right = self._mean_loss(referee, order) if last else 0.0
        rate = BRIGHT * length(self.weights.astype(np.float64)) / max(length(gradient), 1e-30)
        rates = rate * DIM * random.uniform(0.5, 1.0, steps)
        rates[place] = rate
        engine.parameters, engine.velocity = self.weights, np.zeros_like(self.weights)
        found = engine.train_epoch(shuffle, rates) if by_epoch else engine.train(order, rates)
        what = f"step {place + 1} of {steps} in {'an epoch' if by_epoch else 'a call'}"
        self._compare(engine.parameters, rate, gradient, batch, what)
        if last:
            compare_loss(engine, found, right, f"the mean loss of {steps} steps")

    def _mean_loss(self, referee: Referee, order: Order) -> float:
        """Mean loss of the images of `order`, each different one computed once."""
        counts = np.bincount(order % self._distinct)
        losses = [
            referee.reference.gradient(self.images[[image]], self.labels[[image]])[0]
            for image in range(len(counts))
        ]
        return float(np.dot(losses, counts) / len(order))

    def _compare(self, after: Array, rate: float, gradient: Array, batch: Order, what: str) -> None:
        engine, stage = self.engine, self.engine.stage
        right = self.weights - rate * gradient
        error, step = self._largest(after - right), rate * self._largest(gradient)
        shown = 4 * machine_epsilon(stage) * (self._largest(right) + step)
        exact, spread = self._shares() * step + shown, np.zeros_like(step)
        further = self._spreads(gradient, batch)
        while not (error <= (allowed := exact + rate * spread)).all():
            other = next(further, None)
            if other is None:
                worst = int(np.argmin(error <= allowed))
                raise failure(
                    engine,
                    f"{engine.network.parameters[worst].name} after {what}, where this step alone "
                    f"matters, is off by {error[worst]:.3g}, allowed {allowed[worst]:.3g}, where "
                    f"the step is {step[worst]:.3g} long",
                )
            spread = np.maximum(spread, other)
        if (rate * spread > MOST_AMBIGUITY * step).all():
            raise unjudged(
                engine,
                f"products as coarse as those of stage '{stage.name}' leave steps open",
                "fewer layers, tanh for relu, mean for max",
            )

    def _shares(self) -> Array:
        """What may be off for rounding alone, as a share of the step, for each parameter."""
        engine, stage = self.engine, self.engine.stage
        unit = gradient_bound(engine, engine.setup.batch_size)
        shares = []
        for p in engine.network.parameters:
            share = unit * further_slack(engine, p)
            share = max(share, COARSE_STEPS * (stage.rounding or 0.0))
            if stage.conv_weight_slack and is_conv_weight(engine, p):
                share = max(share, 1e-3)
            shares.append(share)
        return np.array(shares)

    def _spreads(self, gradient: Array, batch: Order) -> Iterator[Array]:
        """How far one coarse reference after another leaves the gradient of each parameter open."""
        stage, setup = self.engine.stage, self.engine.setup
        for number in range(MOST_COARSE if stage.rounding else 0):
            with coarse_reference(setup, stage.rounding, number) as coarse:
                coarse.parameters = self.weights.astype(np.float64)
                moved = coarse.gradient(self.images[batch], self.labels[batch])[1]
            yield SPREAD * self._largest(moved - gradient)

    def _largest(self, vector: Array) -> Array:
        """The largest absolute element of each parameter's part of a vector."""
        parameters = self.engine.network.parameters
        return np.array([float(np.abs(p.part(vector)).max()) for p in parameters])


def check_spotlight(
    stage: Stage, setup: Setup, target: Target, dataset: Dataset, random: np.random.Generator
) -> None:
    """Calls of full length in which a single step matters; see the module's docstring.

    Raises ValidationFailed or Unjudged.
    """
    # Without momentum a step leaves nothing behind; a schedule has the stage obey the rates.
    # Dropout's masks would bring back near-ties, other ones in each step.
    kept = tuple(layer for layer in setup.network.layers if not isinstance(layer, Dropout))
    still = dataclasses.replace(
        setup,
        network=dataclasses.replace(setup.network, layers=kept),
        momentum=0.0,
        weight_decay=0.0,
        warmup=0.2,
        labels="",
    )
    steps = len(dataset.train_labels) // setup.batch_size
    with open_engine(stage, still, target) as engine:
        for trial in range(SPOTLIGHTS):
            if trial % 2 == 0:  # the same engine with other images
                light = Spotlight(engine, dataset, random)
            by_epoch, last = trial % 2 == 1, trial < 2
            place = steps - 1 if last else int(random.integers(steps))
            try:
                light.check(by_epoch, place)
            except ValidationFailed:
                if not stage.rounding:
                    raise
                light = Spotlight(engine, dataset, random)
                light.check(by_epoch, place)
