"""Stage tuned: what only it does. What every stage promises is tested in test_stages*.py."""

import re
from dataclasses import replace

import numpy as np
import pytest

from cnnlib.device import Device
from cnnlib.device.architecture import H100
from cnnlib.engine import Setup, plan
from cnnlib.engine.gpu import GpuEngine
from cnnlib.errors import Unsupported
from cnnlib.stages import ring
from cnnlib.stages.tuned import PERSISTENT as STAGE
from cnnlib.stages.tuned.conv import TunedByteConv
from cnnlib.stages.tuned.engine import PersistentEngine
from cnnlib.stages.tuned.layout import Threads, row_pitch
from cnnlib.stages.tuned.operator import TunedOperator
from cnnlib.stages.tuned.plan import (
    MAX_IMAGES,
    ONE_TEAM,
    TWO_TEAMS,
    BlockPlan,
    PersistentOptions,
    candidates,
)
from cnnlib.stages.tuned.plane_conv import TunedPlaneConv
from cnnlib.stages.tuned.schedule import MAX_SUMS, MAX_SUMS_OF_SMALL_BLOCK
from cnnlib.validation.parity import validate
from cnnlib.validation.spot_checks import five_steps
from tests.support.engines import Limited, on, open_engine, pictures, training
from tests.support.networks import NETWORKS, awkward, build, examples, lenet5

pytestmark = pytest.mark.usefixtures("in_haste")

H100_SHARED_BYTES = 232448


def block_plan(network, shared_bytes: int) -> BlockPlan:
    return BlockPlan(STAGE, plan(STAGE, network), shared_bytes)


def held(planned: BlockPlan) -> list[str]:
    return [
        o.label for o in planned.operators if o.needs.optional and o.label in planned.layout.weights
    ]


def test_an_h100_holds_all_weights_of_lenet5() -> None:
    planned = block_plan(lenet5(), H100_SHARED_BYTES)
    assert held(planned) == ["dense1", "dense2", "dense3"]
    assert planned.layout.bytes <= H100_SHARED_BYTES


def test_the_fewest_weights_that_do_give_way() -> None:
    all_held = block_plan(lenet5(), H100_SHARED_BYTES).layout.bytes
    assert held(block_plan(lenet5(), all_held)) == ["dense1", "dense2", "dense3"]
    assert held(block_plan(lenet5(), all_held - 16)) == ["dense1", "dense2"]
    assert held(block_plan(lenet5(), all_held - 10_000)) == ["dense1", "dense3"]
    assert held(block_plan(lenet5(), all_held - 50_000)) == ["dense2", "dense3"]
    with pytest.raises(Unsupported, match="keeps an image's maps"):
        block_plan(lenet5(), 40_000)


def test_a_network_that_does_not_fit_is_refused_and_ring_takes_it(limited: Limited) -> None:
    device = limited(shared_bytes=48 * 1024)
    network = build(
        "wide", (1, 64, 64), 5, [{"conv": {"maps": 8, "kernel": 5}}, {"subsample": 2}, {"dense": 5}]
    )
    message = (
        r"network 'wide' \(208 weights, [\d,]+ numbers in its maps\) need [\d,]+ bytes, and a "
        r"block may have 49,152$"
    )
    with pytest.raises(Unsupported, match=message):
        open_engine(STAGE, network, 4, device)
    with open_engine(ring.STAGE, network, 4, device) as engine:
        assert type(engine) is GpuEngine
        validate(engine, *pictures(network, 4))
        five_steps(engine, *pictures(network, 12))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            examples(),
            "stage 'tuned' cannot take conv2+activation2+subsample1 of network 'examples': the "
            "gradient of its 18,496 weights is summed in registers, 96 of each of 256 threads, and "
            "a thread has room for 64",
        ),
        (
            build("broad", (1, 6, 6), 3, [{"conv": {"maps": 65, "kernel": 1}}, {"dense": 3}]),
            "stage 'tuned' cannot take conv1 of network 'broad': its 65 maps take 36 registers of "
            "a thread for the sums of a position, and a thread has room for 32",
        ),
    ],
    ids=["examples", "broad"],
)
@pytest.mark.parametrize("batch_size", [1, 64, 1024])
@pytest.mark.parametrize("blocks", [2, 132])
def test_weights_that_do_not_fit_a_block_are_named(network, message, batch_size, blocks) -> None:
    """Before anything is compiled, whatever the batch and the device."""
    device = H100.limits._replace(multiprocessors=blocks)
    setup = Setup(network, batch_size, 0.1)
    with pytest.raises(Unsupported, match=f"^{re.escape(message)}$"):
        STAGE.engine.operators_on(STAGE, setup, device)
    planned = ring.STAGE.engine.operators_on(ring.STAGE, setup, device)
    assert {type(operator).__name__ for operator in planned} == {"RingConv", "FusedDense"}


def test_what_is_on_chip_is_told(limited: Limited) -> None:
    device = limited(shared_bytes=110_000)
    with open_engine(STAGE, lenet5(), 5, device) as engine:
        held_ones = engine.choices["chosen"]["weights_on_chip"]
        assert held_ones == ["conv1", "conv2", *held(engine.block)]
        assert "dense1" not in held_ones


def test_more_blocks_than_images_and_fewer(limited: Limited) -> None:
    """The gradient is the same sum, in another order of adding."""
    network, gradients = lenet5(), []
    images, labels = pictures(network, 6)
    for blocks in (1, 2, 3, 6, 9):
        device = limited(multiprocessors=blocks)
        with open_engine(STAGE, network, 6, device) as engine:
            validate(engine, images, labels)
            gradients.append(engine.gradient(images, labels)[1])
    scale = np.abs(gradients[0]).max()
    for gradient in gradients[1:]:
        assert np.abs(gradient - gradients[0]).max() < 1e-5 * scale


@pytest.mark.parametrize("count", [2, 3, 5, 8, 17, 37])
@pytest.mark.parametrize("network", [lenet5(), NETWORKS["lenet5_mean_tanh"], awkward()], ids=str)
def test_a_block_takes_several_images(limited: Limited, network, count: int) -> None:
    """More than its maps have places for, more than it takes together, teams with none left."""
    device = limited(multiprocessors=1)
    with open_engine(STAGE, network, count, device) as engine:
        assert engine.block.images > 1
        assert engine.block.threads == (ONE_TEAM if count == 2 else TWO_TEAMS)
        validate(engine, *pictures(network, count))
        five_steps(engine, *pictures(network, 3 * count))


PADDED = [
    # bytes, by channels, whose maxima need more than their sums; each edge reached differently
    build(
        "uneven",
        (3, 10, 12),
        4,
        [
            {"conv": {"maps": 5, "kernel": 5, "padding": [2, 1]}},
            {"activation": "relu"},
            {"subsample": {"size": 2, "method": "max"}},
            {"dense": 4},
        ],
    ),
    # bytes that some windows do not meet at all; and means, which keep their activated values
    build(
        "far",
        (1, 7, 7),
        4,
        [
            {"conv": {"maps": 9, "kernel": 2, "padding": [0, 3]}},
            {"activation": "scaled_tanh"},
            {"subsample": {"size": 2, "method": "mean"}},
            {"dense": 4},
        ],
    ),
    # floats: windows beyond two opposite edges, and strides
    build("tiny", (2, 2, 3), 4, [{"conv": {"maps": 4, "kernel": 5, "padding": 2}}, {"dense": 4}]),
    build(
        "strided",
        (3, 9, 12),
        4,
        [{"conv": {"maps": 5, "kernel": 4, "stride": 2, "padding": [2, 1]}}, {"dense": 4}],
    ),
]
"""Networks whose images have a border in shared memory."""


@on(*PADDED)
def test_the_first_layer_may_have_padding(limited: Limited, network) -> None:
    """Images come into memory that others, and the gradient, have used before."""
    device = limited(multiprocessors=2)
    channels = network.input_shape[0]
    levels = {} if channels == 1 else {"mean": (33.3, 90.0, 7.0)[:channels]}
    with open_engine(STAGE, network, 19, device, **levels) as engine:
        assert engine.operators[0].takes_bytes == (network.name in ("uneven", "far"))
        assert engine.block.images == 16
        validate(engine, *pictures(network, 19))
        five_steps(engine, *pictures(network, 3 * 19))


@pytest.mark.parametrize(("maps", "images"), [(4, 1), (2, 2), (3, 4), (2, 4)])
def test_threads_read_weights_from_device_memory(limited: Limited, maps: int, images: int) -> None:
    """By loads of four, two or one, as their first one lies, for one image or a few together; by
    tensor cores where there are four images and few weights.
    """
    layers = [{"conv": {"maps": maps, "kernel": 2}}, {"dense": 100}, {"activation": "tanh"}]
    network = build("far_weights", (1, 9, 9), 3, [*layers, {"dense": 3}])
    device, count = limited(multiprocessors=3, shared_bytes=48_000), 3 * images - 1
    usual, *others = candidates(STAGE, plan(STAGE, network), count, device)
    by_threads, both_ways = (maps, images) != (2, 4), (maps, images) == (3, 4)
    assert usual.facts.get("threads_read_l2", False) == by_threads
    matrices = [each for each in others if not each.facts.get("threads_read_l2", True)]
    assert [(each.images, each.threads) for each in matrices] == both_ways * [(4, TWO_TEAMS)]
    assert ((4, ONE_TEAM) in [(each.images, each.threads) for each in others]) == (images == 4)
    assert usual.images == images
    assert "dense1" not in usual.weights_in_shared
    with open_engine(STAGE, network, count, device) as engine:
        assert engine.block.source() == usual.source()
        assert engine.block.operators[1].offset % 4 == {4: 0, 2: 2, 3: 3}[maps]
        validate(engine, *pictures(network, count))
        five_steps(engine, *pictures(network, 3 * count))


@pytest.mark.parametrize(
    ("maps", "rows", "columns", "count"),
    [(4, 8, 8, 16), (2, 8, 16, 5), (1, 16, 16, 5), (3, 8, 11, 1)],
)
def test_tensor_cores_ask_for_several_weights_at_once(
    limited: Limited, maps: int, rows: int, columns: int, count: int
) -> None:
    """By loads of four, two or one, on the way back; for one image, one tile of them or two."""
    layers = [{"conv": {"maps": maps, "kernel": 2}}, {"dense": 60}, {"activation": "tanh"}]
    network = build("far_weights", (1, rows + 1, columns + 1), 3, [*layers, {"dense": 3}])
    stage = replace(STAGE, options=PersistentOptions(threads_read_l2=False))
    device = limited(multiprocessors=1, shared_bytes=60_000)
    with open_engine(stage, network, count, device) as engine:
        dense = engine.block.operators[1]
        assert dense.offset % 4 == {4: 0, 3: 3, 2: 2, 1: 1}[maps]
        assert dense.label not in engine.block.weights_in_shared
        assert engine.block.images == {16: 16, 5: 8, 1: 1}[count]
        validate(engine, *pictures(network, count))
        five_steps(engine, *pictures(network, 3 * count))


@pytest.mark.parametrize("count", [510, 1100])
def test_the_second_phase_sums_more_than_is_on_its_way(limited: Limited, count: int) -> None:
    """Pieces of the batch go through the same shared memory round after round."""
    device = limited(multiprocessors=4)
    network = build("thin", (1, 6, 6), 3, [{"dense": 20}, {"activation": "tanh"}, {"dense": 3}])
    with open_engine(STAGE, network, count, device) as engine:
        # more than all warps have on their way at once, or just as much
        in_all = 8 * engine.block.layout.stages * engine.block.threads.block // 32
        assert (count > in_all) == (count > 512)
        validate(engine, *pictures(network, count))
        five_steps(engine, *pictures(network, 2 * count))


def test_a_convolution_of_many_maps(device: Device) -> None:
    """More sums than a thread has where networks are small; few threads have room for them."""
    layers = [
        {"conv": {"maps": 8, "kernel": 5}},
        {"activation": "relu"},
        {"subsample": 2},
        {"conv": {"maps": 48, "kernel": 5}},
        {"activation": "relu"},
        {"subsample": 2},
        {"dense": 3},
    ]
    network = build("many", (1, 20, 20), 3, layers)
    with open_engine(STAGE, network, 5, device) as engine:
        assert isinstance(engine, PersistentEngine)
        conv = engine.block.operators[1]
        sums = conv.shape.gradient_sums(conv.schedule.weights_warps)
        assert MAX_SUMS < sums <= MAX_SUMS_OF_SMALL_BLOCK
        validate(engine, *pictures(network, 5))
        five_steps(engine, *pictures(network, 15))


def test_where_several_do_not_fit_fewer_are_taken(limited: Limited) -> None:
    device = limited(multiprocessors=1, shared_bytes=90_000)
    with open_engine(STAGE, lenet5(), 64, device) as engine:
        assert 1 < engine.block.images < MAX_IMAGES
        validate(engine, *pictures(lenet5(), 64))


@pytest.mark.parametrize(
    ("options", "images", "threads"),
    [
        (PersistentOptions(two_teams=False), 16, ONE_TEAM),
        (PersistentOptions(max_images=4), 4, TWO_TEAMS),
        (PersistentOptions(max_images=1), 1, ONE_TEAM),
        (
            PersistentOptions(products=("tf32",), max_images=2, few_images=1),
            2,
            ONE_TEAM,
        ),
    ],
    ids=["one_team", "four_images", "one_image", "matrices_of_two_images"],
)
def test_a_variant_can_leave_a_choice_out(
    limited: Limited,
    options: PersistentOptions,
    images: int,
    threads: Threads,
) -> None:
    """What the stage gains by it is then one record: replace(STAGE, name=..., options=...)."""
    device = limited(multiprocessors=1)
    variant, network = replace(STAGE, options=options), awkward()
    with open_engine(variant, network, 17, device) as engine:
        assert (engine.block.images, engine.block.threads) == (images, threads)
        validate(engine, *pictures(network, 17))


def test_planes_are_the_same_wherever_a_map_is_split(
    limited: Limited, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the layer that makes it, which keeps a bit of each number for its way back, or by the next
    one, forward and backward.
    """
    layers: list[object] = [
        *({"conv": {"maps": 5, "kernel": 3}}, {"activation": "relu"}, {"subsample": 2}),
        *({"conv": {"maps": 16, "kernel": 3}}, {"activation": "relu"}, {"subsample": 2}),
        {"dense": 3},
    ]
    network, device = build("planes", (1, 22, 14), 3, layers), limited(multiprocessors=1)
    images, labels = pictures(network, 5)
    found = []
    for between in (True, False):
        if not between:
            monkeypatch.setattr(TunedPlaneConv, "follow", TunedOperator.follow)
        with open_engine(STAGE, network, 5, device) as engine:
            assert [o.leaves_planes for o in engine.block.operators] == [between, False, False]
            validate(engine, images, labels)
            found.append(engine.gradient(images, labels)[1])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("floats", [1, 4, 8, 10, 84, 120, 256, 257, 800])
def test_rows_begin_in_banks_of_their_own(floats: int) -> None:
    pitch = row_pitch(floats)
    assert floats <= pitch < floats + 20
    assert pitch % 4 == 0
    for rows, wide in ((8, 4), (4, 8)):
        banks = {(row * pitch + i) % 32 for row in range(rows) for i in range(wide)}
        assert len(banks) == (32 if wide == 8 else 16)


def test_only_the_first_convolution_takes_bytes() -> None:
    operators = block_plan(lenet5(), H100_SHARED_BYTES).operators
    assert [type(operator) is TunedByteConv for operator in operators[:2]] == [True, False]
    strided = build(
        "s", (1, 9, 9), 3, [{"conv": {"maps": 2, "kernel": 3, "stride": 2}}, {"dense": 3}]
    )
    assert not isinstance(block_plan(strided, H100_SHARED_BYTES).operators[0], TunedByteConv)


def test_the_profile_names_every_layer_both_ways(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = NETWORKS["lenet5_mean_tanh"]
    with training(STAGE, network, 4, 8, device) as engine:
        rows = engine.profile()
        labels = [operator.label for operator in engine.block.operators]
        for part in ("forward", "backward"):
            assert [row.layer for row in rows if row.part == part] == labels
        phase = [row.seconds for row in rows if row.kernel != "update"]
        assert all(seconds > 0 for seconds in phase)
        # the sections are shares of one launch, of whatever length
        monkeypatch.setattr(engine, "time_launch", lambda run: 2.0)
        phase = [row.seconds for row in engine.profile() if row.kernel != "update"]
        assert sum(phase) == pytest.approx(2.0)
        assert all(row.flops > 0 for row in rows if row.part in ("forward", "backward"))
