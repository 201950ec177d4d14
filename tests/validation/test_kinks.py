"""Near-ties: right kernels that decide them otherwise are accepted, wrong ones are not."""

import dataclasses
import math

import numpy as np
import pytest

from cnnlib.datasets.specs import SyntheticSpec
from cnnlib.datasets.synthetic import synthetic
from cnnlib.engine import Setup
from cnnlib.layers import FUNCTIONS, Activation, Conv, Subsample
from cnnlib.stages import LADDER, gemm, naive
from cnnlib.validation.kinks import KinkDetector
from cnnlib.validation.parity import validate
from cnnlib.validation.reference import FAST_REFERENCE
from cnnlib.validation.spot_checks import five_steps
from cnnlib.validation.tolerances import COARSE, FACTOR, longest_sum
from cnnlib.validation.verdicts import Unjudged, ValidationFailed
from tests.support.engines import open_engine, pictures
from tests.support.networks import build, deep, lenet5
from tests.support.tensor_cores import use_tensor_cores

GPU_LADDER = [stage for stage in LADDER if stage.runs_on == "cuda"]

NEAR_TIE = build(
    "near_tie",
    (1, 2, 2),
    2,
    [{"conv": {"maps": 1, "kernel": 1}}, {"activation": "relu"}, {"dense": 2}],
)


def detector_at(network, vector, **settings):
    detector = KinkDetector(Setup(network, 4, 0.1, **settings))
    detector.parameters = vector
    return detector


def test_only_images_with_a_near_tie_are_changed():
    # relu of byte - 7, times the weight: close at 7 if the bias makes it so
    images = np.array([[[[9, 8], [3, 1]]], [[[9, 7], [3, 1]]]], np.uint8)
    vector = np.ones(NEAR_TIE.parameter_count)
    vector[1] = -7 + 1e-6
    with detector_at(NEAR_TIE, vector) as detector:
        assert detector.has_near_tie(images).tolist() == [False, True]
        perturbed, tied = detector.perturb(images)
        assert np.array_equal(perturbed[0], images[0])
        assert not (perturbed[1] == 7).any()
        assert not len(tied)
        vector[1] = -7  # exactly zero is no near-tie
        detector.parameters = vector
        assert np.array_equal(detector.perturb(images)[0], images)


def near_ties(*deciding):
    """With the parameters below most images have near-ties, whatever noise is added."""
    first, second = {"conv": {"maps": 3, "kernel": 1}}, {"conv": {"maps": 4, "kernel": 3}}
    layers = [first, *deciding, second, {"activation": "tanh"}, {"dense": 3}]
    return build("near_ties", (3, 24, 24), 3, layers)


RELU = near_ties({"activation": "relu"})
MAX = near_ties({"subsample": 2})
BOTH = near_ties({"activation": "relu"}, {"subsample": 2})


def tied_parameters(network):
    """The first convolution adds up a number of 1024 levels and a very small one."""
    vector = network.initial_parameters(1)
    views = network.views(vector)
    views[0]["weight"][:, :, 0, 0] = [[1, 0.25, 1e-7], [-1, 0.25, 1e-7], [0.25, 1, -1e-7]]
    views[0]["bias"][...] = 0
    views[-3]["weight"][...] /= 100
    return vector


def open_near_ties(stage, network, batch_size):
    engine = open_engine(stage, network, batch_size, mean=127, deviation=1, learning_rate=1e-4)
    engine.parameters = tied_parameters(network)
    return engine


class OtherRelu(gemm.WholeActivation):
    """Decides too early, by 1e-6 of the largest element: as wrong as rounding may be."""

    def forward(self):
        if self.function is not FUNCTIONS["relu"]:
            return super().forward()
        limit = 1e-6 * np.abs(self.source).max(axis=tuple(range(self.source.ndim - 1)))
        self._slope[...] = (self.source > -limit) & (self.source != 0)
        np.multiply(self.source, self._slope, out=self.target)
        return None


class OtherMax(gemm.SlicedSubsample):
    """Sees later elements of a window larger than they are, by up to 1e-6 of the largest."""

    def forward(self):
        largest = np.abs(self.source).max(axis=tuple(range(self.source.ndim - 1)))
        rows, columns = self.planned.layer(Subsample).size
        parts = [self.source[i::rows, :, j::columns] for i in range(rows) for j in range(columns)]
        for place, part in enumerate(parts):
            # what relu made zero stays so: equals are equal in any arithmetic
            part += place / len(parts) * 1e-6 * largest * (part > 0)
        super().forward()


def with_operators(stage, name, *changes):
    return dataclasses.replace(stage, name=name, operators=stage.operators | dict(changes))


def gradient_of(stage, network, images, labels):
    with open_near_ties(stage, network, len(images)) as engine:
        return engine.gradient(images, labels)[1]


@pytest.mark.parametrize(
    ("network", "change"),
    [
        (RELU, ((Activation,), OtherRelu)),
        (MAX, ((Subsample,), OtherMax)),
        (BOTH, ((Subsample,), OtherMax)),
    ],
    ids=["relu", "max", "both"],
)
def test_the_ambiguity_bound_holds_for_other_decisions(network, change):
    images, labels = pictures(network, 16)
    otherwise = with_operators(FAST_REFERENCE, "otherwise", change)
    found = gradient_of(otherwise, network, images, labels)
    right = gradient_of(FAST_REFERENCE, network, images, labels)
    with detector_at(network, tied_parameters(network), mean=127) as detector:
        ambiguity = detector.ambiguity_bound_of_loss(images, labels, len(images))
    seen = 0.0
    for p in network.parameters:
        part = slice(p.offset, p.offset + p.size)
        largest = np.abs(right[part]).max()
        errors = np.abs(found[part] - right[part])
        # the rest is what OtherMax adds to the maps
        assert (errors <= ambiguity[part] + 1e-5 * largest).all()
        seen = max(seen, errors.max() / largest)
    assert seen > 1e-3  # far above rounding


LEAK = 0.25


class EarlyLeaky(gemm.WholeActivation):
    """Takes the slope above zero too early, by 1e-6 of the largest element."""

    def forward(self):
        super().forward()
        if self.function is FUNCTIONS["relu"]:
            limit = 1e-6 * np.abs(self.target).max(axis=tuple(range(self.target.ndim - 1)))
            self.early = np.where((self.target > -LEAK * limit) & (self.target != 0), 1, LEAK)

    def backward(self):
        if self.function is FUNCTIONS["relu"]:
            np.multiply(self.source_error, self.early, out=self.source_error)
        else:
            super().backward()


def test_the_ambiguity_bound_holds_for_a_kink_with_slopes_on_both_sides(monkeypatch):
    leaky = dataclasses.replace(
        FUNCTIONS["relu"],
        values=lambda source, target, slope: np.multiply(
            source, np.where(source > 0, 1, LEAK), out=target
        ),
        slopes=lambda target, slope: np.copyto(slope, np.where(target > 0, 1, LEAK)),
        slope_type=None,
        kink=(LEAK, 1),
    )
    monkeypatch.setitem(FUNCTIONS, "relu", leaky)
    test_the_ambiguity_bound_holds_for_other_decisions(RELU, ((Activation,), EarlyLeaky))


@pytest.mark.parametrize("network", [RELU, MAX, BOTH], ids=["relu", "max", "both"])
def test_float32_that_decides_otherwise_is_accepted(network):
    images, labels = pictures(network, 64)
    with open_near_ties(gemm.STAGE, network, 64) as engine:
        with KinkDetector(engine.setup) as detector:
            detector.parameters = engine.parameters
            assert len(detector.perturb(images)[1]) > 16
        assert validate(engine, images, labels) < 1
        five_steps(engine, images, labels)


def test_float32_that_decides_otherwise_is_far_from_float64():
    # or else the test above says nothing
    images, labels = pictures(MAX, 64)
    found, right = (
        gradient_of(stage, MAX, images, labels) for stage in (gemm.STAGE, FAST_REFERENCE)
    )
    first = slice(0, 9)  # the weight of conv1
    rounding = FACTOR * np.finfo(np.float32).eps * math.sqrt(longest_sum(MAX, 64))
    assert np.abs(found - right)[first].max() > 2 * rounding * np.abs(right[first]).max()


def test_a_batch_of_4096_is_accepted_and_left_with_few_near_ties():
    network = lenet5()
    images, labels = pictures(network, 4096)
    with open_engine(gemm.STAGE, network, 4096) as engine:
        with KinkDetector(engine.setup) as detector:
            detector.parameters = engine.parameters
            asked = detector.has_near_tie(images)
            perturbed, tied = detector.perturb(images)
        assert 0 < asked.sum() < 1000
        assert len(tied) < 10
        assert np.array_equal(perturbed[~asked], images[~asked])
        validate(engine, images, labels)


# Each of these images has so many near-ties that noise helps too few of them.
DEEP = [deep(12, 8), deep(11, 16), deep(20, 8), deep(4, 64, "max"), deep(13, 16, "mean")]
ONE_CORE = dataclasses.replace(gemm.STAGE, threads=1)


def blobs(count):
    spec = SyntheticSpec(
        kind="synthetic", shape=(1, 28, 28), classes=10, train_images=count, test_images=10
    )
    images, labels, _, _ = synthetic(spec)
    return images, labels


@pytest.mark.parametrize("network", DEEP, ids=lambda network: network.name)
def test_deep_networks_are_judged(network):
    images, labels = blobs(16)
    with open_engine(ONE_CORE, network, 16, mean=80, deviation=60) as engine:
        before = engine.parameters
        assert validate(engine, images, labels) < 0.5
        assert np.array_equal(engine.parameters, before)
        five_steps(engine, images, labels)


@pytest.mark.usefixtures("in_haste")
@pytest.mark.parametrize("stage", GPU_LADDER, ids=lambda stage: stage.name)
@pytest.mark.parametrize("network", [deep(11, 8, "max")], ids=lambda network: network.name)
def test_kernels_are_judged_on_a_deep_network(stage, network, device):
    with open_engine(stage, network, 4, device) as engine:
        validate(engine, *pictures(network, 4))
        five_steps(engine, *pictures(network, 8))


def test_the_loops_are_judged_on_a_deep_network():
    network = deep(13, 8, "max")
    with open_engine(naive.STAGE, network, 2) as engine:
        validate(engine, *pictures(network, 2))


def test_wide_batches_are_judged_with_few_copies():
    # every image asks, whatever its noise
    network = deep(6, 64, "max")
    images, _ = pictures(network, 48)
    with detector_at(network, network.initial_parameters(1), mean=33.3, deviation=78.6) as detector:
        assert len(detector.perturb(images)[1]) > 8
        settled, tied = detector.avoid_near_ties(images)
        assert not len(tied)
        assert len(np.unique(settled, axis=0)) >= 42
        # and they are what they were but for some noise
        assert np.abs(settled.astype(float) - images).max(axis=(1, 2, 3)).min() <= 16


def test_a_relu_that_lets_nothing_through_is_opened():
    network = deep(4, 8)
    images, labels = pictures(network, 4)
    with open_engine(gemm.STAGE, network, 4) as engine:
        vector = engine.parameters
        network.views(vector)[4]["bias"][...] = -100
        engine.parameters = vector
        assert not engine.gradient(images, labels)[1][: network.parameters[4].offset].any()
        assert validate(engine, images, labels) > 0
    stage = with_operators(gemm.STAGE, "wrong", ((Conv,), LastRowLost))
    with open_engine(stage, network, 4) as engine:
        engine.parameters = vector
        with pytest.raises(ValidationFailed, match="is off by"):
            validate(engine, images, labels)


def test_a_gradient_of_zeros_says_nothing():
    network = deep(4, 8)
    images, labels = pictures(network, 4)
    images[...] = 33
    with open_engine(gemm.STAGE, network, 4, mean=33) as engine:
        with pytest.raises(
            Unjudged, match=r"cannot be judged: the gradient of conv1\.weight is zero"
        ):
            validate(engine, images, labels)


def test_a_gradient_too_small_for_the_numbers_says_nothing():
    # of float32; after so many sigmoids rounding is as large as the gradient itself
    layers = [{"conv": {"maps": 2, "kernel": 3}}, *[{"activation": "sigmoid"}] * 60, {"dense": 3}]
    network = build("vanishing", (1, 8, 8), 3, layers)
    with open_engine(gemm.STAGE, network, 4) as engine:
        with pytest.raises(
            Unjudged, match=r"conv1\.weight is .*e-40 at most, too small for float32"
        ):
            validate(engine, *pictures(network, 4))
    with open_engine(FAST_REFERENCE, network, 4) as engine:
        validate(engine, *pictures(network, 4))


def test_references_that_disagree_blame_no_stage(monkeypatch):
    network = deep(3, 2)
    wrong = with_operators(FAST_REFERENCE, "gemm in float64", ((Conv,), LastRowLost))
    monkeypatch.setattr("cnnlib.validation.reference.FAST_REFERENCE", wrong)
    with open_engine(gemm.STAGE, network, 4) as engine:
        with pytest.raises(Unjudged, match="'deep3x2' cannot be judged: the two references disag"):
            validate(engine, *pictures(network, 4))


def coarse():
    return dataclasses.replace(gemm.STAGE, name="coarse", rounding=2.0**-10, threads=1)


def test_coarse_products_are_judged_in_a_deep_network(monkeypatch):
    use_tensor_cores(monkeypatch)
    network = deep(8, 8, "max")
    with open_engine(coarse(), network, 8) as engine:
        images, labels = pictures(network, 8)
        with (
            KinkDetector(engine.setup) as detector,
            FAST_REFERENCE.engine(FAST_REFERENCE, engine.setup) as reference,
        ):
            detector.parameters = engine.parameters
            images, _ = detector.avoid_near_ties(images)
            vector = engine.parameters = reference.parameters = detector.parameters
            found = engine.gradient(images, labels)[1]
            right = reference.gradient(images, labels)[1]
        # beyond what is allowed in a network of a few layers
        assert np.linalg.norm(found - right) > COARSE * 2.0**-10 * np.linalg.norm(right)
        validate(engine, images, labels)
    with open_engine(coarse(), network, 8) as engine:
        engine.parameters = vector
        engine.gradient = lambda images, labels: (0, right / 2)
        with pytest.raises(ValidationFailed, match="'coarse' .* the whole gradient is off by"):
            validate(engine, images, labels)
    with open_engine(dataclasses.replace(coarse(), rounding=2.0**-5), network, 8) as engine:
        engine.parameters = vector
        engine.gradient = lambda images, labels: (0, 4 * right)
        with pytest.raises(Unjudged, match="coarse as those of stage 'coarse' leave .* open"):
            validate(engine, images, labels)


class LastRowLost(gemm.MatrixConv):
    def backward(self):
        self.target_error[-1] = 0
        super().backward()


class LeakyRelu(gemm.WholeActivation):
    def forward(self):
        super().forward()
        self._slope[0] = True


class LateWinner(gemm.SlicedSubsample):
    """Takes a later element for the winner if it comes near, by a hundredth of the largest."""

    def forward(self):
        largest = np.abs(self.source).max()
        self.source[1::2] += 0.01 * largest * (self.source[1::2] > 0)
        super().forward()
        self.source[1::2] -= 0.01 * largest * (self.source[1::2] > 0)


@pytest.mark.parametrize(
    ("kind", "operator"),
    [(Conv, LastRowLost), (Activation, LeakyRelu), (Subsample, LateWinner)],
    ids=lambda value: value.__name__,
)
def test_wrong_operators_are_rejected_all_the_same(kind, operator):
    stage = with_operators(gemm.STAGE, "wrong", ((kind,), operator))
    with open_near_ties(stage, BOTH, 64) as engine:
        with pytest.raises(ValidationFailed, match=r"stage 'wrong' fails validation .* is off by"):
            validate(engine, *pictures(BOTH, 64))


class LostImage(gemm.MatrixConv):
    """The error of one image is lost, in the deepest convolutions alone."""

    def backward(self):
        if self.planned.start >= 20:
            self.target_error[..., 0] = 0
        super().backward()


@pytest.mark.parametrize("network", DEEP[:3], ids=lambda network: network.name)
@pytest.mark.parametrize(
    ("kind", "operator"),
    [(Conv, LastRowLost), (Activation, LeakyRelu), (Conv, LostImage)],
    ids=lambda value: value.__name__,
)
def test_wrong_operators_are_rejected_in_deep_networks(network, kind, operator):
    stage = with_operators(ONE_CORE, "wrong", ((kind,), operator))
    with open_engine(stage, network, 16, mean=80, deviation=60) as engine:
        with pytest.raises(ValidationFailed, match=r"stage 'wrong' fails validation .* is off by"):
            validate(engine, *blobs(16))


def test_biases_move_where_no_noise_helps():
    # dark places, and so most decisions of relu, are zero but for a very small bias
    images, labels = pictures(RELU, 4)
    images[:, :, 2:] = 127
    with open_near_ties(gemm.STAGE, RELU, 4) as engine:
        vector = tied_parameters(RELU)
        RELU.views(vector)[0]["bias"][...] = 1e-5
        engine.parameters = vector
        with KinkDetector(engine.setup) as detector:
            detector.parameters = vector
            assert len(detector.perturb(images)[1]) == 4
            settled, tied = detector.avoid_near_ties(images)
            assert not len(tied)
            moved = np.flatnonzero(detector.parameters != vector)
            assert not detector.has_near_tie(settled).any()
        bias = RELU.parameters[1]
        assert set(moved) <= set(range(bias.offset, bias.offset + bias.size))
        assert validate(engine, images, labels) < 1
        assert np.array_equal(engine.parameters, vector)
        with_wrong = with_operators(gemm.STAGE, "wrong", ((Activation,), LeakyRelu))
    with open_near_ties(with_wrong, RELU, 4) as engine:
        engine.parameters = vector
        with pytest.raises(ValidationFailed, match="is off by"):
            validate(engine, images, labels)


def test_nothing_is_said_where_decisions_leave_too_much_open():
    # all elements of a window are nearly equal, whatever the images
    images, labels = pictures(MAX, 4)
    with open_near_ties(gemm.STAGE, MAX, 4) as engine:
        vector = tied_parameters(MAX)
        first = MAX.views(vector)[0]
        first["weight"][...] *= 1e-8
        first["bias"][...] = 1
        engine.parameters = vector
        with pytest.raises(
            Unjudged, match=r"'near_ties' cannot be judged: near-ties .* open in the "
        ):
            validate(engine, images, labels)
