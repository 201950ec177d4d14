"""Launches that are captured and made again as one, and programmatic launches, on each device."""

from collections.abc import Callable

import numpy as np
import pytest

from cnnlib.device import Device, DeviceArray, Kernel, KernelError
from cnnlib.errors import DeviceError

pytestmark = pytest.mark.quick

Probe = Callable[[str], Kernel]
SIZE = 1 << 16


@pytest.fixture(autouse=True)
def can_capture(device: Device) -> None:
    if problem := device.capture_problem():
        pytest.skip(problem)


def pair(device: Device) -> tuple[DeviceArray, DeviceArray]:
    """Two arrays, each of them a step's source and the next one's target."""
    first, second = device.array(SIZE), device.array(SIZE)
    first.set(np.arange(SIZE, dtype=np.float32) % 8)
    return first, second


def chain(
    device: Device, probe: Probe, arrays: tuple[DeviceArray, DeviceArray], programmatic: bool
) -> list[Callable[[], None]]:
    """An even number of steps, which end in the first of the arrays."""
    kernel, blocks = probe("step_of_a_chain"), 2 * device.multiprocessors
    return [
        kernel.bind(blocks, 128, source, target, SIZE, programmatic=programmatic)
        for source, target in [arrays, arrays[::-1]] * 5
    ]


@pytest.mark.parametrize("programmatic", [False, True])
def test_a_graph_is_its_launches_in_their_order(
    device: Device, probe: Probe, programmatic: bool
) -> None:
    arrays = pair(device)
    launches = chain(device, probe, arrays, programmatic)

    def all_of_them() -> None:
        for launch in launches:
            launch()

    graph = device.capture(all_of_them)
    assert graph.launches == len(launches) == 10
    np.testing.assert_array_equal(arrays[0].get(), np.arange(SIZE) % 8)  # none of them has run
    expected = arrays[0].get()
    for _ in range(2):
        graph.launch()
        for _ in launches:
            expected = 2 * np.roll(expected, 1) + 1
        np.testing.assert_array_equal(arrays[0].get(), expected)
    all_of_them()
    for _ in launches:
        expected = 2 * np.roll(expected, 1) + 1
    np.testing.assert_array_equal(arrays[0].get(), expected)


def test_a_graph_keeps_the_arrays_it_needs(device: Device, probe: Probe) -> None:
    arrays = list(pair(device))
    unbound = probe("step_of_a_chain")
    graph = device.capture(lambda: unbound(1, 128, *arrays, SIZE))
    used = device.used_bytes()
    seen = arrays[1].part(0, SIZE)
    arrays.clear()
    assert device.used_bytes() == used
    graph.launch()
    np.testing.assert_array_equal(seen.get()[:3], [15, 1, 3])
    del graph, seen
    assert device.used_bytes() < used


def test_only_launches_are_captured(device: Device, probe: Probe) -> None:
    first, second = pair(device)
    event, launch = device.event(), chain(device, probe, (first, second), False)[0]
    host = np.zeros(SIZE, np.float32)
    graph = device.capture(launch)
    for what, others in {
        "a copy to the device": lambda: second.set(host),
        "a copy from the device": lambda: second.get(host),
        "a fill": second.fill_bytes,
        "a new array": lambda: device.array(3),
        "an event": event.record,
        "waiting for the device": device.synchronize,
        "a capture": lambda: device.capture(launch),
        "a graph": graph.launch,
    }.items():
        with pytest.raises(DeviceError, match=f"^{what} while launches are captured: a graph"):
            device.capture(lambda others=others: (launch(), others()))
        # the device does its work as before, and has run nothing
        assert np.isnan(second.get()).all()
    launch()
    assert second.get()[1] == 1


def test_a_broken_launch_leaves_no_capture_behind(device: Device, probe: Probe) -> None:
    with pytest.raises(KernelError, match="argument 0 is a str"):
        device.capture(lambda: probe("step_of_a_chain")(1, 32, "a"))
    first, second = pair(device)
    device.capture(chain(device, probe, (first, second), True)[0]).launch()
    assert second.get()[1] == 1
