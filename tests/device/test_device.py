"""What every device promises; the same tests run emulated and on a GPU."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from cnnlib.device import (
    Changing,
    Device,
    DeviceArray,
    DeviceLimits,
    Kernel,
    KernelError,
    open_device,
)
from cnnlib.errors import DeviceError, DoesNotFit

pytestmark = pytest.mark.quick

Probe = Callable[[str], Kernel]
RANDOM = np.random.default_rng(15418)


def upload(device: Device, values: np.ndarray) -> DeviceArray:
    array = device.array(values.shape, values.dtype)
    array.set(values)
    return array


def integers(*shape: int) -> np.ndarray:
    return RANDOM.integers(-4, 5, shape).astype(np.float32)


def test_describes_itself(device: Device) -> None:
    assert device.kind in ("cuda", "emulated")
    assert device.name
    assert device.multiprocessors >= 1


def test_keeps_to_the_limits_it_is_given(device: Device) -> None:
    with open_device(device.kind, DeviceLimits(device.kind, 1, 50_000, (7, 5))) as small:
        assert (small.kind, small.multiprocessors, small.shared_bytes) == (device.kind, 1, 50_000)
    assert device.shared_bytes >= 100_000


def test_says_where_nvml_finds_it(device: Device) -> None:
    if device.kind == "emulated":
        assert device.pci_bus_id is None
    else:
        assert re.fullmatch(r"[0-9a-fA-F]{4,8}(:[0-9a-fA-F]{2}){2}\.[0-7]", device.pci_bus_id or "")


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8, np.float64, np.int64])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 2), (0, 4), (1000, 1001)])
def test_round_trip(device: Device, shape: tuple[int, ...], dtype: type) -> None:
    values = RANDOM.integers(0, 100, shape).astype(dtype)
    array = upload(device, values)
    assert (array.shape, array.dtype, array.size, array.nbytes) == (
        shape,
        values.dtype,
        values.size,
        values.nbytes,
    )
    np.testing.assert_array_equal(array.get(), values)
    out = np.empty_like(values)
    assert array.get(out) is out
    np.testing.assert_array_equal(out, values)


def test_round_trip_of_strided_host_arrays(device: Device) -> None:
    values = integers(6, 8)
    array = upload(device, values.T)
    np.testing.assert_array_equal(array.get(), values.T)
    out = np.zeros((6, 8), np.float32)
    array.get(out.T)
    np.testing.assert_array_equal(out, values)


def test_pinned_upload(device: Device) -> None:
    staging = device.pinned((100, 3), np.uint8)
    assert isinstance(staging, np.ndarray)
    assert (staging.shape, staging.dtype) == ((100, 3), np.uint8)
    array = device.array((100, 3), np.uint8)
    for value in range(5):
        staging[...] = value
        array.set(staging)
        device.synchronize()
        assert (array.get() == value).all()


def test_new_arrays_are_poisoned(device: Device) -> None:
    for _ in range(2):  # the second time the memory has been used before
        array = device.array((33,))
        assert np.isnan(array.get()).all()
        array.set(np.zeros(33, np.float32))
        array.free()
    assert (device.array(5, np.int32).get() == -1).all()
    assert (device.array(5, np.uint8).get() == 255).all()


def test_fill_bytes(device: Device) -> None:
    array = device.array((2, 3))
    array.fill_bytes(0)
    assert (array.get() == 0).all()
    array.part(2, 3).fill_bytes()
    np.testing.assert_array_equal(
        np.isnan(array.get()), [[False] * 2 + [True], [True] * 2 + [False]]
    )


def test_parts_share_memory(device: Device) -> None:
    values = np.arange(24, dtype=np.float32)
    whole = upload(device, values)
    part = whole.part(4, (2, 5))
    np.testing.assert_array_equal(part.get(), values[4:14].reshape(2, 5))
    part.set(np.zeros((2, 5), np.float32))
    values[4:14] = 0
    np.testing.assert_array_equal(whole.get(), values)
    np.testing.assert_array_equal(part.part(5, 3).get(), np.zeros(3))
    del whole
    np.testing.assert_array_equal(part.get(), np.zeros((2, 5)))


@pytest.mark.parametrize(("start", "shape"), [(-1, 2), (20, 5), (0, (5, 5)), (25, 0)])
def test_part_outside(device: Device, start: int, shape: int | tuple[int, ...]) -> None:
    with pytest.raises(DeviceError, match="24 elements"):
        device.array(24).part(start, shape)


def test_copies_are_checked(device: Device) -> None:
    array = device.array((2, 3))
    for wrong in (np.zeros((3, 2), np.float32), np.zeros((2, 3)), np.zeros(6, np.float32)):
        with pytest.raises(DeviceError, match="float32"):
            array.set(wrong)
        with pytest.raises(DeviceError, match="float32"):
            array.get(wrong)


def test_memory_is_counted(device: Device) -> None:
    before, free = device.used_bytes(), device.free_bytes()
    array = device.array(1 << 20)
    part = array.part(0, 16)
    assert device.used_bytes() - before == array.nbytes == 4 << 20
    assert free > device.free_bytes() > 0
    array.free()
    array.free()
    assert device.used_bytes() == before
    for used in (array, part):
        with pytest.raises(DeviceError, match="freed"):
            used.get()
        with pytest.raises(DeviceError, match="freed"):
            used.set(np.zeros(used.shape, np.float32))
    held = device.array(1 << 20)
    assert device.used_bytes() > before
    del held
    assert device.used_bytes() == before


def test_does_not_fit(device: Device) -> None:
    used = device.used_bytes()
    with pytest.raises(DoesNotFit, match=str(4 << 50)):
        device.array(1 << 50)
    assert device.used_bytes() == used
    assert (device.array(10, np.uint8).get() == 255).all()


def test_every_kind_of_argument(device: Device, probe: Probe) -> None:
    ints = upload(device, np.array([3, -70000], np.int32))
    data = upload(device, np.array([1, 2, 250], np.uint8))
    for i, u, f in (
        (-5, 7, 0.25),
        (2**24, 2**24, -1e30),
        (np.int64(-3), np.uint8(9), np.float32(2)),
    ):
        out = device.array(5)
        probe("write_arguments")(1, 1, out, ints, data, i, u, f)
        np.testing.assert_array_equal(out.get(), np.array([i, u, f, -70000, 250], np.float32))


def test_wrong_launches(device: Device, probe: Probe) -> None:
    kernel, out = probe("visit_range"), device.array(4, np.int32)
    for grid, block in ((0, 1), (1, 0), ((1, 1, 1, 1), 1), (1, ()), ((2, -1), 1)):
        with pytest.raises(KernelError, match="probe_visit_range"):
            kernel(grid, block, out, 4)
    with pytest.raises(KernelError, match="probe_visit_range"):
        kernel(1, 2048, out, 4)
    with pytest.raises(KernelError, match="argument 0 is a ndarray"):
        kernel(1, 1, np.zeros(4, np.int32), 4)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="probe_visit_range"):
        kernel(1, 1, out, 2**31)
    freed = device.array(4, np.int32)
    freed.free()
    with pytest.raises(DeviceError, match="freed"):
        kernel(1, 1, freed, 4)


@pytest.mark.parametrize("block", [1, 32, 33, 256, 1024])
@pytest.mark.parametrize("grid", [1, 3, 17, 64])
@pytest.mark.parametrize("n", [0, 1, 31, 1000, 4099])
def test_any_grid_visits_each_once(
    device: Device, probe: Probe, n: int, grid: int, block: int
) -> None:
    for name in ("visit_strided", "visit_range", "visit_block_range"):
        out = upload(device, np.zeros(n + 64, np.int32))
        probe(name)(grid, block, out, n)
        np.testing.assert_array_equal(out.get(), np.arange(n + 64) < n, err_msg=name)


def test_indices_in_three_dimensions(device: Device, probe: Probe) -> None:
    grid, block = (4, 3, 2), (5, 2, 3)
    out = device.array((*grid[::-1], *block[::-1]), np.int32)
    probe("write_indices")(grid, block, out)
    bz, by, bx, tz, ty, tx = np.indices(out.shape)
    np.testing.assert_array_equal(
        out.get(), tx + 10 * ty + 100 * tz + 1000 * bx + 10000 * by + 100000 * bz
    )


@pytest.mark.parametrize("threads", [32, 64, 256, 1024])
@pytest.mark.parametrize("name", ["sum_tree", "sum_shuffle"])
def test_block_reductions(device: Device, probe: Probe, name: str, threads: int) -> None:
    values = integers(5003)
    out = device.array(7)
    probe(name)(7, threads, upload(device, values), out, values.size)
    np.testing.assert_array_equal(out.get(), np.full(7, values.sum()))


@pytest.mark.parametrize("n", [1, 16, 37, 96])
@pytest.mark.parametrize("grid", [1, 5, 40])
def test_tiled_product_is_exact_on_integers(
    device: Device, probe: Probe, grid: int, n: int
) -> None:
    a, b = integers(n, n), integers(n, n)
    c = device.array((n, n))
    probe("multiply_tiles")(grid, (16, 16), upload(device, a), upload(device, b), c, n)
    np.testing.assert_array_equal(c.get(), a @ b)


def test_warp_operations(device: Device, probe: Probe) -> None:
    out = device.array((9, 64), np.int32)
    probe("warp_operations")(1, 64, out)
    t = np.arange(64)
    lane, warp = t % 32, t // 32 * 32
    expected = [
        warp + 5,
        t // 8 * 8 + 3,
        np.where(lane >= 2, t - 2, t),
        np.where(t % 16 + 3 < 16, t + 3, t),
        t ^ 7,
        np.full(64, sum(1 << i for i in range(0, 32, 3))),
        np.where(t >= 32, 1, 0),
        np.where(t < 32, 1, 0),
        np.where(lane < 16, t ^ 1, t ^ 2),
    ]
    # as 32-bit patterns: the ballot has its highest bits free, so no sign to mind
    np.testing.assert_array_equal(out.get(), np.array(expected, np.int64).astype(np.int32))


def test_block_votes(device: Device, probe: Probe) -> None:
    out = device.array(96, np.int32)
    probe("votes")(1, 96, out)
    np.testing.assert_array_equal(out.get(), np.full(96, 20 + 1000 + 100000))


def test_integer_atomics(device: Device, probe: Probe) -> None:
    out = upload(device, np.zeros(3, np.int32))
    probe("count_multiples")(13, 96, out, 10000)
    np.testing.assert_array_equal(out.get(), [1429, 13 * 96 - 1, -12])


def test_vector_types(device: Device, probe: Probe) -> None:
    values = integers(8)
    out = device.array(1)
    probe("vectors")(1, 32, upload(device, values), out)
    assert out.get()[0] == (values.reshape(2, 4) @ [1, 2, 3, 4]).sum()


def test_large_shared_memory(device: Device, probe: Probe) -> None:
    assert device.shared_bytes >= 100_000
    out = device.array(9)
    launch = probe("sum_large").bind(9, 64, out, shared_bytes=100_000)
    for _ in range(2):
        out.fill_bytes()
        launch()
        np.testing.assert_array_equal(out.get(), np.full(9, 50000))


def test_bound_launches(device: Device, probe: Probe) -> None:
    out = upload(device, np.zeros((2, 100), np.int32))
    launches = [
        probe("visit_range").bind(3, (16, 2), out.part(row * 100, 100), length)
        for row, length in ((0, 100), (1, 7))
    ]
    for launch in (*launches, launches[1]):
        launch()
    expected = np.ones((2, 100), int)
    expected[1] = 2 * (np.arange(100) < 7)
    np.testing.assert_array_equal(out.get(), expected)
    with pytest.raises(KernelError, match="probe_visit_range"):
        probe("visit_range").bind((0, 1), 1, out, 100)


def test_an_argument_that_changes_between_launches(device: Device, probe: Probe) -> None:
    out, length = upload(device, np.zeros(100, np.int32)), Changing(3)
    launch = probe("visit_range").bind(3, 16, out, length)
    for length.value in (7, 100, 0):
        launch()
    np.testing.assert_array_equal(out.get(), 1 + (np.arange(100) < 7))
    with pytest.raises(DeviceError, match="a launch whose arguments change while"):
        device.capture(launch)
    with pytest.raises(KernelError, match="probe_visit_range: a programmatic launch cannot change"):
        probe("visit_range").bind(3, 16, out, length, programmatic=True)


def test_an_array_viewed_as_another_kind(device: Device) -> None:
    floats = upload(device, np.array([0.0, 1.0, np.inf], np.float32))
    words = floats.part(1, 2).viewed(np.uint32)
    np.testing.assert_array_equal(words.get(), [0x3F800000, 0x7F800000])
    words.set(np.array([0x40000000, 0], np.uint32))
    np.testing.assert_array_equal(floats.get(), [0, 2, 0])
    with pytest.raises(DeviceError, match="float32 cannot be viewed as uint16"):
        floats.viewed(np.uint16)


def test_many_phases_repeat_bit_for_bit(device: Device, probe: Probe) -> None:
    results = []
    for _ in range(3):
        out = device.array(5 * 96)
        probe("phases")(5, 96, out, 40)
        results.append(out.get())
    board = np.arange(96, dtype=np.float32)
    for _ in range(40):
        board = np.float32(0.5) * (board + np.roll(board, 1))
    np.testing.assert_array_equal(results[0], np.tile(board, 5))
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


def test_compile_error_names_module_and_line(device: Device) -> None:
    source = '#include "portable.cuh"\nnamespace a {\nint broken = nothing_here;\n}\n'
    with pytest.raises(DeviceError, match=r"module lenet-fused.*nothing_here") as caught:
        device.compile(source, "lenet-fused", [])
    assert "\n" not in str(caught.value)
    assert "lenet-fused" in str(caught.value).split("does not compile")[1]


def test_unknown_kernel(device: Device, probe_source: str) -> None:
    with pytest.raises(DeviceError, match="probe_nothing"):
        device.compile(probe_source, "probe.cu", ["probe_nothing"])
    module = device.compile(probe_source, "probe.cu", ["probe_votes"])
    with pytest.raises(DeviceError, match="probe_nothing"):
        module.kernel("probe_nothing")


def test_same_source_is_compiled_once(device: Device, probe_source: str) -> None:
    first = device.compile(probe_source, "probe.cu", ["probe_votes"])
    assert device.compile(probe_source, "probe.cu", ["probe_votes"]) is first
    assert first.kernel("probe_votes") is first.kernel("probe_votes")


def test_flags_are_passed(device: Device) -> None:
    source = """#include "portable.cuh"
ENTRY_POINT(flag, write)(int* out) { out[0] = VALUE; }
"""
    out = device.array(1, np.int32)
    for value in (3, 4):
        module = device.compile(source, "flag.cu", ["flag_write"], [f"-DVALUE={value}"])
        module.kernel("flag_write")(1, 1, out)
        assert out.get()[0] == value


def test_events(device: Device, probe: Probe) -> None:
    first, second = device.event(), device.event()
    with pytest.raises(DeviceError, match="record"):
        second.seconds_since(first)
    out = device.array(64)
    first.record()
    for _ in range(20):
        probe("phases")(2, 32, out, 20)
    second.record()
    assert 0 < second.seconds_since(first) < 60
    assert first.seconds_since(first) == 0


def test_resources(device: Device, probe: Probe) -> None:
    resources = probe("sum_tree").resources()
    if device.kind == "emulated":
        assert resources is None
    else:
        assert resources is not None
        assert resources.registers > 0
        assert resources.shared_bytes == 4096
        assert resources.local_bytes == 0


def test_unknown_choice() -> None:
    with pytest.raises(DeviceError, match="unknown device 'gpu'; known: auto, cuda, emulated"):
        open_device("gpu")
