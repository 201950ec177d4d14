"""What is assumed of a GPU, and of one without a record."""

import pytest

from cnnlib.device.api import Capability
from cnnlib.device.architecture import (
    A100,
    B200,
    BULK_COPIES,
    H100,
    KNOWN,
    RTX_4090,
    T4,
    TENSOR_CORES,
    Architecture,
    architecture_of,
)

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda gpu: gpu.sm)
def test_a_device_has_the_record_of_its_kind(gpu: Architecture) -> None:
    assert architecture_of(gpu.limits) is gpu


@pytest.mark.parametrize(
    ("capability", "gpu"),
    [((7, 0), T4), ((8, 6), A100), ((8, 9), RTX_4090), ((10, 3), B200), ((12, 0), B200)],
)
def test_a_device_without_a_record_has_that_of_an_older_one(
    capability: Capability, gpu: Architecture
) -> None:
    assert architecture_of(H100.limits._replace(capability=capability)) is gpu


def test_what_came_with_which_compute_capability() -> None:
    assert [gpu.sm for gpu in KNOWN] == ["sm_75", "sm_80", "sm_89", "sm_90", "sm_100"]
    assert [gpu.has(TENSOR_CORES) for gpu in KNOWN] == [False, True, True, True, True]
    assert [gpu.has(BULK_COPIES) for gpu in KNOWN] == [False, False, False, True, True]
