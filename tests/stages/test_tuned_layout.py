"""Stage tuned: where arrays lie in shared memory, how warps share products, and what C++ checks of
both.
"""

import subprocess
from dataclasses import replace
from itertools import combinations

import pytest

from cnnlib.device.architecture import H100
from cnnlib.device.compiler import find_compiler
from cnnlib.engine import Setup, Stage
from cnnlib.network import FLOAT, Network
from cnnlib.paths import KERNELS
from cnnlib.stages.tuned import PERSISTENT as STAGE
from cnnlib.stages.tuned.conv import TunedConv
from cnnlib.stages.tuned.engine import PersistentEngine
from cnnlib.stages.tuned.layout import ALIGNMENT, Region, SharedLayout
from cnnlib.stages.tuned.plan import BlockPlan, PersistentOptions
from cnnlib.stages.tuned.schedule import MAX_SUMS, MAX_SUMS_OF_SMALL_BLOCK
from tests.support.networks import LINEAR, NETWORKS, UNUSUAL, lenet5, shipped

pytestmark = pytest.mark.quick

ALL = [*NETWORKS.values(), *LINEAR.values(), *UNUSUAL.values(), shipped("lenet5_1998")]
each_network = pytest.mark.parametrize("network", ALL, ids=str)
each_batch = pytest.mark.parametrize("batch_size", [1, 64, 1024, 4096])


SPLIT_AT_USE = replace(STAGE, options=PersistentOptions(products=("tf32",)))


def plan_of(network: Network, batch_size: int, stage: Stage = STAGE) -> BlockPlan:
    return PersistentEngine.plan_on(stage, Setup(network, batch_size, 0.1), H100.limits)


def in_use_together(a: Region, b: Region) -> bool:
    return "always" in (a.phase, b.phase) or a.phase == b.phase


@each_network
@each_batch
def test_no_two_arrays_that_are_in_use_together_overlap(network: Network, batch_size: int) -> None:
    layout = plan_of(network, batch_size).layout
    assert {region.phase for region in layout.regions} >= {"images", "update", "always"}
    assert layout.bytes <= H100.shared_bytes
    for region in layout.regions:
        assert region.floats > 0
        assert region.offset % ALIGNMENT == 0
        assert region.offset + region.floats <= layout.floats
    for a, b in combinations(layout.regions, 2):
        if in_use_together(a, b):
            assert a.offset + a.floats <= b.offset or b.offset + b.floats <= a.offset, (a, b)


def test_maps_of_as_many_images_as_fit_stay_on_chip() -> None:
    """All eight of a block at batch 1024, and eight of sixteen at 4096: weights come first."""
    for batch_size, images, away in (
        (512, 4, ["dense2"]),
        (1024, 8, ["dense1"]),
        (4096, 16, ["dense1"]),
    ):
        plan = plan_of(lenet5(), batch_size)
        assert plan.images == images
        assert plan.layout.slots == min(images, 8)
        assert [o.label for o in plan.operators if o.label not in plan.layout.weights] == away
        more = plan.layout.bytes + plan.threads.teams * plan.layout.kept_floats * FLOAT
        assert images <= 8 or more > H100.shared_bytes


def test_a_layout_depends_on_its_arguments_alone() -> None:
    def layout() -> SharedLayout:
        return plan_of(lenet5(), 1024).layout

    assert layout() == layout()


@each_network
@each_batch
def test_a_schedule_keeps_within_registers_and_threads(network: Network, batch_size: int) -> None:
    plan = plan_of(network, batch_size, SPLIT_AT_USE)
    for conv in plan.operators:
        if not isinstance(conv, TunedConv):
            continue
        shape, schedule, warps = conv.shape, conv.schedule, plan.threads.team_warps
        assert schedule.forward_m_tiles * shape.forward_sums <= MAX_SUMS
        assert schedule.weights_warps * schedule.weights_split_k <= warps
        sums = shape.gradient_sums(schedule.weights_warps)
        assert sums <= conv.gradient_limit <= MAX_SUMS_OF_SMALL_BLOCK
        assert 1 <= schedule.data_split_k <= shape.maps


def compiler_says(source: str) -> str:
    """The errors of the machine's C++ compiler."""
    command = [*find_compiler().command, "-std=gnu++17", "-fsyntax-only", "-w", "-x", "c++", "-"]
    done = subprocess.run(
        [*command, "-I", str(KERNELS)], input=source, capture_output=True, text=True, check=False
    )
    return done.stderr


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SCRATCH_FLOATS", 12, "forward's sums lie in Scratch"),
        ("GRADIENT_PITCH of planes", 4, "a term's gradient has a place for each map"),
        ("STAGED_FLOATS", 12, "every share of the gradient has a place in Staged"),
        ("STAGED_FLOATS of planes", 12, "every warp's gradient has a place in Staged"),
        ("FULL_PITCH", 12, "tiles of positions lie within a map"),
        ("WEIGHTS_WARPS", 99, "each warp has one share of the gradient"),
        ("REDUCE_FLOATS", 12, "all warps' stages lie in shared memory"),
        ("REDUCE_STAGES", 3, "two are multiplied at a time"),
        ("PARTIALS", 12, "partial sums lie one behind the other"),
        ("ROWS", 5, "source includes its border"),
    ],
)
def test_sizes_that_do_not_go_together_do_not_compile(name: str, value: int, said: str) -> None:
    """Python hands over each size once; the kernels assert what they need of it."""
    name, _, planes = name.partition(" of ")
    source = plan_of(lenet5(), 64, STAGE if planes else SPLIT_AT_USE).source()
    assert not compiler_says(source)
    before, _, after = source.partition(f" {name} = ")
    assert after
    wrong = f"{before} {name} = {value}{after.lstrip('0123456789')}"
    assert said in compiler_says(wrong)
