"""Plan `graph` of stage tuned: products by tensor cores in software, their range, and tiles."""

from dataclasses import replace

import numpy as np
import pytest

from cnnlib.device import Device, cuda
from cnnlib.device.architecture import H100, T4
from cnnlib.engine import Engine, Planned, Setup, Stage, gpu
from cnnlib.engine.gpu import GpuEngine
from cnnlib.network import Network
from cnnlib.stages.tuned.graph import (
    OPERATORS,
    GraphConv,
    GraphDense,
    ProductOptions,
    tiles,
)
from cnnlib.stages.tuned.graph.tiles import product_tile, weight_pitches
from cnnlib.stages.tuned.graph.windows import Windows
from cnnlib.validation.parity import validate
from cnnlib.validation.spot_checks import five_steps
from tests.stages.test_other_gpus import ptx
from tests.support.engines import Limited, open_engine, pictures
from tests.support.networks import build, shipped

pytestmark = pytest.mark.usefixtures("in_haste")

STAGE = Stage(
    name="graph",
    title="graph",
    change="layer by layer",
    runs_on="cuda",
    engine=GpuEngine,
    operators=OPERATORS,
    after="ring",
)


def products() -> Network:
    """Every way in which a product lies in shared memory, in few layers.

    The convolutions are unfolded; read from patches, by stripes of two images; with strides that
    spread the errors; and with a mean. The first dense layer drops units, and has terms for several
    blocks.
    """
    return build(
        "products",
        (2, 14, 13),
        4,
        [
            {"conv": {"maps": 18, "kernel": 3, "padding": 1}},
            {"activation": "relu"},
            {"subsample": [2, 3]},
            {"conv": {"maps": 33, "kernel": [3, 2], "stride": [1, 2], "padding": [2, 1]}},
            {"activation": "tanh"},
            {"conv": {"maps": 36, "kernel": 2}},
            {"subsample": {"size": 2, "method": "mean"}},
            {"dense": 40},
            {"activation": "scaled_tanh"},
            {"dropout": 0.6},
            {"dense": 4},
        ],
    )


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """Kernels that are emulated multiply as tensor cores do, and not by floats."""
    unit = gpu.translation_unit
    if device.kind == "emulated":
        head = "#define EMULATED_TENSOR_CORES\n"
        monkeypatch.setattr(gpu, "translation_unit", lambda *parts: head + unit(*parts))


def opened(arithmetic: str, device: Device, batch: int = 3) -> Engine:
    stage = replace(STAGE, options=ProductOptions(arithmetic=arithmetic))  # type: ignore[arg-type]
    return open_engine(stage, products(), batch, device)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize(("arithmetic", "many_tiles"), [("f16x3", 0), ("bf16x6", 4)])
def test_products_of_planes_are_as_exact_as_float32(
    arithmetic: str, many_tiles: int, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once with weights that a block keeps for all of its tiles, and once staged for each."""
    monkeypatch.setattr(tiles, "MANY_TILES", many_tiles)
    with opened(arithmetic, device) as engine:
        kept = [operator.forward_tile.keeps_weights for operator in engine.operators]  # type: ignore[attr-defined]
        assert any(kept) == (many_tiles == 0)
        images, labels = pictures(products(), 3)
        validate(engine, images, labels)
        validate(engine, *pictures(products(), 2, seed=1))  # leaves of the batch before stay there
        # A power of two is only an exponent more in everything that errors become.
        errors = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
        gradient = engine.backward(images, errors)
        for power in (-60, 60):
            scaled = engine.backward(images, errors * np.float32(2.0**power))
            assert np.array_equal(scaled, gradient * np.float32(2.0**power)), power
        errors[2, 1] = np.inf
        assert not np.isfinite(engine.backward(images, errors)).all()


@pytest.mark.usefixtures("tensor_cores")
def test_tiles_between_the_usual_ones(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles whose rows a warp loads one after the other, where two blocks are said to overlap.

    The errors' tiles are large enough to be staged by windows, which leave out a column, and
    one of which begins within a row of windows.
    """
    monkeypatch.setattr(tiles, "SHAPES", tiles.SHAPES | {64: tiles.MORE_SHAPES[64][:1]})
    monkeypatch.setattr(tiles, "MORE_SHAPES", {})
    layers: list[object] = [
        {"conv": {"maps": 34, "kernel": 3, "padding": 1}},
        {"activation": "relu"},
        {"conv": {"maps": 36, "kernel": [3, 4], "padding": [1, 2]}},
        {"activation": "relu"},
        {"subsample": {"size": [2, 3], "stride": [2, 3]}},
        {"dropout": 0.3},
        {"dense": 4},
    ]
    network = build("between", (1, 8, 12), 4, layers)
    with open_engine(STAGE, network, 5, device) as engine:
        rows = [operator.forward_tile.rows for operator in engine.operators]  # type: ignore[attr-defined]
        assert 160 in rows
        validate(engine, *pictures(network, 5))
        validate(engine, *pictures(network, 2, seed=1))  # leaves of the batch before stay there


def test_blocks_that_share_a_tile_add_in_one_order(limited: Limited) -> None:
    """More multiprocessors than tiles: small tiles, and sums of several blocks.

    Some gradients have many partial sums then and others few, and the update takes each as it is.
    """
    device = limited(multiprocessors=16)
    network = products()
    options = ProductOptions(launch="programmatic", gather="device", small_tiles=True)
    with open_engine(replace(STAGE, options=options), network, 8, device, momentum=0.5) as engine:
        dense = next(o for o in engine.operators if o.label == "dense1")  # type: ignore[attr-defined]
        assert dense.forward_tile.splits > 1
        sums = [o.gradient_tile.partial_sums for o in engine.operators]  # type: ignore[attr-defined]
        assert min(sums) <= gpu.FEW_GROUPS < max(sums)
        five_steps(engine, *pictures(network, 24))
        found = [engine.gradient(*pictures(network, 8)) for _ in range(2)]
        assert found[0][0] == found[1][0]
        assert np.array_equal(found[0][1], found[1][1])


@pytest.mark.quick
def test_a_patch_has_the_rows_of_every_tile() -> None:
    windows = Windows(16, (3, 2), (2, 1), (11, 7), (2, 3), (2, 2))
    for rows in (16, 64, 256):
        seen = []
        for first in range(0, 40 * windows.positions, windows.used(rows)):
            places = []
            for position in range(first, first + windows.used(rows)):
                cell, element = divmod(position, 4)
                image, own = divmod(cell, 6)
                places.append(image * 11 + (own // 3 * 2 + element // 2) * 2)
            seen.append(max(places) - min(places) + 3)
        assert windows.patch_rows(rows) == max(seen)


@pytest.mark.quick
def test_small_batches_have_small_tiles() -> None:
    """Of pytorch/examples' second convolution on an H100: work for every multiprocessor."""
    network = shipped("pytorch_examples")
    planned = Planned(GraphConv, network, 2, 5)
    for batch in (16, 64, 1024):
        operator = GraphConv(planned, STAGE, H100.limits)
        operator.prepare(batch, None)
        tile = operator.forward_tile
        assert tile.jobs >= H100.multiprocessors // 2
        assert 2 * operator.backward_bytes <= H100.shared_bytes
    dense = GraphDense(Planned(GraphDense, network, 6, 8), STAGE, H100.limits)
    dense.prepare(64, None)
    assert dense.forward_tile.splits > 1
    assert dense.forward_tile.jobs >= H100.multiprocessors // 2


@pytest.mark.quick
@pytest.mark.parametrize("chunk", [2, 4, 8, 16])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 9, 15, 25])
def test_eight_threads_stage_weights_in_eight_banks(taps: int, chunk: int) -> None:
    """As kernels/tuned/graph/product.cuh counts them: taps first, then columns, or groups."""
    columns = 32
    pitch, tap_pitch = weight_pitches(taps, chunk, columns)
    places = []
    for thread in range(taps * chunk * columns):
        rest, tap = divmod(thread, taps)
        column, group = divmod(rest, chunk) if taps == 1 else (rest % columns, rest // columns)
        places.append(tap * tap_pitch + group * pitch + column)
    assert len(set(places)) == len(places)
    for first in range(0, len(places), 8):
        assert len({place % 8 for place in places[first : first + 8]}) == 8


@pytest.mark.quick
def test_a_tile_that_fits_nowhere_is_none() -> None:
    wide = Windows(16, (3, 3), (1, 1), (9, 9000), (7, 8998), (1, 1))
    limits = H100.limits._replace(shared_bytes=16 * 1024)
    rest = {"smallest": False, "overlapping": True}
    tile = product_tile(wide, 64, 1, limits, 32, **rest)
    assert tile is not None
    assert tile.unfold
    assert product_tile(wide, 64, 1, limits._replace(shared_bytes=64), 32, **rest) is None


MATRICES = {"compute_75": b"m16n8k8.row.col.f32.f16", "compute_90": b"m16n8k16.row.col.f32.f16"}
"""GPUs, and the products of F16 that they have."""


@pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("architecture", MATRICES)
def test_tensor_cores_of_every_gpu_are_used(architecture: str) -> None:
    layers = [{"conv": {"maps": 9, "kernel": 3}}, {"subsample": 2}, {"dense": 4}]
    setup = Setup(build("tensors", (1, 12, 12), 4, layers), batch_size=64, learning_rate=0.1)
    limits = T4.limits if architecture == "compute_75" else H100.limits
    code = ptx(GpuEngine.source_on(STAGE, setup, limits), "tensors", architecture)
    assert b"mma.sync.aligned." + MATRICES[architecture] in code
    for loads in (b"ldmatrix.sync.aligned.m8n8.x4.shared", b"ldmatrix.sync.aligned.m8n8.x4.trans"):
        assert loads in code
