"""Peers train as exactly as stages do, and rows say so where their libraries are absent."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnlib.engine import Setup, plan
from cnnlib.errors import Unsupported
from cnnlib.layers import Dropout
from cnnlib.measuring import schema
from cnnlib.measuring.run import measure
from cnnlib.measuring.runs import Run
from cnnlib.peers import PEERS, jax, pytorch
from cnnlib.stages import find_stage, gemm
from cnnlib.validation.parity import validate
from cnnlib.validation.reference import FAST_REFERENCE
from cnnlib.validation.spot_checks import five_steps
from cnnlib.validation.verdicts import ValidationFailed
from tests.support.engines import each_of, open_engine, pictures, training
from tests.support.networks import NETWORKS, awkward, build, lenet5
from tests.support.toys import toy_config, toy_data

HERE = [
    stage
    for stage in PEERS
    if not stage.rounding and (not stage.options or stage.options.graph != "always")
]
PACKAGE = {stage.name: stage.name.partition("_")[0] for stage in PEERS}


@pytest.fixture
def installed(stage):
    if not importlib.util.find_spec(PACKAGE[stage.name]):
        pytest.skip(f"{PACKAGE[stage.name]} is not installed")


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    """PyTorch compiles a function a few times only; a measurement has a process of its own."""
    if "torch" in sys.modules:
        sys.modules["torch"].compiler.reset()


@each_of(HERE)
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("network", NETWORKS.values(), ids=list(NETWORKS))
def test_parity(stage, network) -> None:
    with open_engine(stage, network, 7, momentum=0.9) as engine:
        validate(engine, *pictures(network, 7))
        five_steps(engine, *pictures(network, 21))


@each_of(HERE)
@pytest.mark.usefixtures("installed")
def test_a_mean_and_a_deviation_of_each_channel(stage) -> None:
    layers = [{"conv": {"maps": 3, "kernel": 3}}, {"activation": "tanh"}, {"dense": 4}]
    network = build("colours", (3, 10, 8), 4, layers)
    levels = {"mean": (30.0, 120.0, 200.5), "deviation": (20.0, 64.25, 90.0)}
    with open_engine(stage, network, 7, **levels) as engine:
        validate(engine, *pictures(network, 7))


DROPS = build(
    "drops",
    (2, 9, 7),
    3,
    [
        {"conv": {"maps": 3, "kernel": [3, 2], "padding": 1}},
        {"activation": "leaky_relu"},
        {"subsample": {"size": 3, "stride": 2}},
        {"dropout": 0.25},
        {"activation": "scaled_tanh"},
        {"dense": 6},
        {"activation": "gelu"},
        {"dropout": 0.5},
        {"dense": 3},
    ],
)


@each_of(HERE)
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("loss", ["cross_entropy", "mean_squared_error"])
def test_dropout_has_the_masks_of_every_stage(stage, loss) -> None:
    """Steps with dropout, overlapping windows and weight decay end at the reference's weights."""
    settings = dict(momentum=0.5, loss=loss, weight_decay=0.01, seed=2**33 + 5)
    with open_engine(stage, DROPS, 7, **settings) as engine:
        engine.steps = 12
        validate(engine, *pictures(DROPS, 7))
        five_steps(engine, *pictures(DROPS, 21))
        assert engine.steps == 17


def coarse_gradient(key):
    """Engine of float32 whose gradient of conv1's weight or bias is off by 2e-4 of the largest."""

    class Coarse(gemm.STAGE.engine):
        def gradient(self, images, labels):
            loss, gradient = super().gradient(images, labels)
            view = self.network.views(gradient)[0][key].reshape(-1)
            view[0] += 2e-4 * np.abs(view).max()
            return loss, gradient

    return Coarse


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_only_gradients_of_convolutions_weights_may_be_as_coarse_as_winograds(key) -> None:
    peer = find_stage("torch", "--stage")
    coarse = replace(
        gemm.STAGE,
        engine=coarse_gradient(key),
        slack=peer.slack,
        conv_weight_slack=peer.conv_weight_slack,
    )
    for stage in (coarse, replace(coarse, conv_weight_slack=None)):
        with open_engine(stage, lenet5(), 1) as engine:
            if key == "weight" and stage is coarse:
                assert 0.05 < validate(engine, *pictures(lenet5(), 1)) < 1
            else:
                with pytest.raises(ValidationFailed, match=f"conv1.{key}"):
                    validate(engine, *pictures(lenet5(), 1))


@each_of(HERE)
@pytest.mark.usefixtures("installed")
def test_the_order_is_followed_and_the_rest_of_it_dropped(stage) -> None:
    order = np.random.default_rng(3).permutation(40)[:37]
    results = []
    for one in (stage, FAST_REFERENCE):
        with training(one, awkward(), 10, 40, momentum=0.5) as engine:
            results.append((engine.train(order), engine.parameters, engine.velocity))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert np.abs(results[0][1] - results[1][1]).max() < 1e-4
    assert np.abs(results[0][2] - results[1][2]).max() < 1e-4


@each_of(HERE)
@pytest.mark.usefixtures("installed")
def test_learning_rates_change_with_the_steps(stage) -> None:
    order, rates = np.random.default_rng(3).permutation(40), np.array([0.1, 0.4, 0.2, 0.01])
    results = []
    for one in (stage, FAST_REFERENCE):
        with training(one, awkward(), 10, 40, momentum=0.5, warmup=0.3) as engine:
            engine.train(order[:20], rates[:2])
            engine.train(order[20:], rates[2:])
            results.append(engine.parameters)
    assert np.abs(results[0] - results[1]).max() < 1e-4


def test_the_step_that_a_graph_repeats_is_a_step() -> None:
    """The recorded step finds its batch and its learning rate by itself."""
    torch = pytest.importorskip("torch")
    order, rates, found = np.arange(30)[::-1].copy(), np.array([0.3, 0.01, 0.2]), []
    for one_by_one in (False, True):
        stage = find_stage("torch", "--stage")
        with training(stage, awkward(), 10, 30, momentum=0.5, warmup=0.3) as engine:
            if one_by_one:
                engine._order.copy_(torch.from_numpy(order))
                engine._rates.copy_(torch.from_numpy(np.repeat(rates, 10)))
                for _ in rates:
                    engine._train_next()
            else:
                engine.train(order, rates)
            found.append(engine.parameters)
    assert np.array_equal(*found)


@each_of(HERE)
@pytest.mark.usefixtures("installed")
def test_loading_trains_nothing(stage) -> None:
    network = awkward()
    with open_engine(stage, network, 4, momentum=0.9) as engine:
        before = engine.parameters
        engine.load(*pictures(network, 12))
        assert np.array_equal(engine.parameters, before)
        assert not engine.velocity.any()


@each_of(HERE)
@pytest.mark.usefixtures("installed")
def test_logits_of_any_number_of_images(stage) -> None:
    network = awkward()
    images, _ = pictures(network, 11)
    with open_engine(stage, network, 4) as engine:
        found = engine.logits(images)
    with open_engine(FAST_REFERENCE, network, 11) as reference:
        assert found == pytest.approx(reference.logits(images), rel=1e-4, abs=1e-5)


@each_of(HERE)
@pytest.mark.usefixtures("installed")
def test_it_is_measured_as_a_stage_is(stage, tmp_path: Path) -> None:
    run = Run("toy", "small", stage.name, 4, 1)
    measure(toy_config(), run, toy_data(tmp_path)[1], tmp_path)
    rows = schema.read(tmp_path / "epochs.csv", "epochs")
    assert set(rows.status) == {"ok"}
    assert rows.validated.all()
    assert set(rows.device_kind) == {"cpu"}


class Library:
    """Stands in for a library and notes the last part of every name that is called."""

    def __init__(self, called: list[str], name: str = "") -> None:
        self._called, self._name = called, name

    def __getattr__(self, name: str) -> "Library":
        return Library(self._called, name)

    def __call__(self, *arguments, **options) -> "Library":
        self._called.append(self._name)
        return self

    def __matmul__(self, other) -> "Library":
        self._called.append("matmul")
        return self

    def __getitem__(self, place) -> "Library":
        return self

    def __len__(self) -> int:
        return 1

    def _same(self, other) -> "Library":
        return self

    __add__ = __truediv__ = _same


LAYERS = [
    {"conv": {"maps": 2, "kernel": 3}},
    {"activation": "relu"},
    {"subsample": 2},
    {"activation": "tanh"},
    {"subsample": {"size": 2, "method": "mean"}},
    {"activation": "sigmoid"},
    {"dropout": 0.5},
    {"dense": 3},
]


@pytest.mark.parametrize("package", [pytorch, jax], ids=["torch", "jax"])
def test_operators_are_named_by_what_they_call(package) -> None:
    network = build("all", (1, 14, 14), 3, LAYERS)
    stage = find_stage(package.__name__.rpartition(".")[2].replace("py", ""), "here")
    names = []
    for planned in plan(stage, network):
        called: list[str] = []
        library, name = Library(called), package.function_of(planned)
        layout = ["NCHW"] if package is jax else []
        count = sum(p.layer == planned.start for p in network.parameters)
        parameters = [library] * (1 if planned.find(Dropout) else count)
        planned.operator(library, *layout, planned, library, parameters)
        assert name in called
        names.append(name)
    assert len(set(names)) == (8 if package is pytorch else 7)


@each_of(HERE)
@pytest.mark.usefixtures("installed")
def test_run_json_names_what_ran(stage, tmp_path: Path) -> None:
    run = Run("toy", "small", stage.name, 4, 1)
    measure(toy_config(), run, toy_data(tmp_path)[1], tmp_path)
    facts = json.loads((tmp_path / "run.json").read_text())
    first = {"torch": "conv2d", "jax": "conv_general_dilated"}[PACKAGE[stage.name]]
    assert facts["plan"][:2] == [f"conv1: {first}", "activation1: relu"]
    assert facts["engine"] == stage.engine.__name__
    if PACKAGE[stage.name] == "torch":
        assert facts["compiled"] == ("compile" in stage.name)
        assert facts["cuda_graph"] is False


@each_of(PEERS)
def test_an_absent_package_leaves_a_row(stage, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE[stage.name], None)
    run = Run("toy", "small", stage.name, 4, 1)
    measure(toy_config(), run, toy_data(tmp_path)[1], tmp_path)
    rows = schema.read(tmp_path / "epochs.csv", "epochs")
    assert list(rows.status) == ["unavailable"]
    assert "is not installed (pip install" in (tmp_path / "run.json").read_text()


@each_of([stage for stage in PEERS if stage not in HERE])
@pytest.mark.usefixtures("installed")
def test_what_needs_a_gpu_says_so(stage) -> None:
    with pytest.raises(Unsupported, match=f"stage '{stage.name}' needs a GPU"):
        stage.engine(stage, Setup(lenet5(), 4, 0.1))


def test_less_precision_has_a_name_of_its_own() -> None:
    coarse = {stage.name for stage in PEERS if stage.rounding}
    assert coarse == {stage.name for stage in PEERS if stage.name.endswith("_tf32")}
    assert find_stage("jax_tf32", "here").rounding == 2**-10


def test_coarse_products_are_judged_as_a_whole() -> None:
    """A gradient that is off by what TF32 rounds passes, one that is off by more does not."""
    stage = find_stage("gemm", "here")
    network = lenet5()

    class Coarse(stage.engine):  # type: ignore[name-defined]
        error = 0.0

        def gradient(self, images, labels):
            loss, gradient = super().gradient(images, labels)
            noise = np.random.default_rng(0).standard_normal(len(gradient))
            noise *= self.error * np.linalg.norm(gradient) / np.linalg.norm(noise)
            return loss, gradient + noise

    rough = replace(stage, name="rough", engine=Coarse, rounding=2**-10)
    images, labels = pictures(network, 64)  # of so many, few decisions of relu and max are near
    with open_engine(rough, network, 64) as engine:
        engine.error = 4 * 2**-10
        validate(engine, images, labels)
        engine.error = 0.1
        with pytest.raises(ValidationFailed, match="the whole gradient"):
            validate(engine, images, labels)
