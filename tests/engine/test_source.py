"""The generated source is sizes alone, and kernels refuse sizes that cannot be right."""

import functools
import re
import subprocess

import pytest

from cnnlib.device.architecture import H100
from cnnlib.device.compiler import find_compiler
from cnnlib.engine import Setup, Stage
from cnnlib.engine.source import WIDTH, KernelSource, translation_unit
from cnnlib.paths import KERNELS
from cnnlib.stages import fused, gemm_cuda, ring
from tests.support.networks import fused_padding, lenet5


@pytest.mark.quick
def test_a_unit_has_every_file_once_and_a_struct_for_every_layer() -> None:
    first = KernelSource("conv1", "fused/conv.cuh", {"MAPS": 6, "FUNCTION": "RELU"})
    second = KernelSource("conv2", "fused/conv.cuh", {"MAPS": 16, "FUNCTION": "TANH"})
    assert translation_unit([first, second]) == (
        '#include "fused/conv.cuh"\n\n'
        "struct conv1 {\n  static constexpr int MAPS = 6, FUNCTION = RELU;\n};\n"
        "FUSED_CONV_KERNELS(conv1)\n\n"
        "struct conv2 {\n  static constexpr int MAPS = 16, FUNCTION = TANH;\n};\n"
        "FUSED_CONV_KERNELS(conv2)\n"
    )


@pytest.mark.quick
def test_a_size_and_its_value_stay_in_one_line() -> None:
    sizes = {f"SIZE_OF_PART_{number}": number for number in range(100)}
    lines = KernelSource("many", "batch.cuh", sizes).struct.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert sum(len(re.findall(r"\b\w+ = \d+", line)) for line in lines) == 100


@pytest.mark.quick
def test_numbers_have_a_declaration_of_their_own() -> None:
    constants = {"SIZE": 3, "SCALE": 4 / 3, "RATE": 1e-5, "THRESHOLD": -(2**31)}
    assert KernelSource("dropout1", "gemm/dropout.cuh", constants).struct == (
        "struct dropout1 {\n"
        "  static constexpr int SIZE = 3, THRESHOLD = -2147483648;\n"
        "  static constexpr float SCALE = 1.3333333333333333f, RATE = 1e-05f;\n"
        "};"
    )


@functools.cache
def messages(source: str) -> str:
    """What the compiler says about a unit."""
    command = [*find_compiler().command, "-std=gnu++17", "-fsyntax-only", "-x", "c++", "-w"]
    done = subprocess.run(
        [*command, f"-I{KERNELS}", "-"], input=source, capture_output=True, text=True, check=False
    )
    return done.stderr


@pytest.mark.parametrize(
    ("stage", "size", "change", "message"),
    [
        (gemm_cuda.STAGE, "PARAMETERS", -1, "a slice has a gradient of each weight"),
        (gemm_cuda.STAGE, "SUM_THREADS", 1, "32 neighbouring weights"),
        (gemm_cuda.STAGE, "N_TILE", 1, "threads share out the results"),
        (gemm_cuda.STAGE, "WINDOW_ROWS", 1, "windows lie side by side"),
        (gemm_cuda.STAGE, "ROW_PADDING", 1, "no window reaches beyond the map"),
        (gemm_cuda.STAGE, "WIDTH", 1, "windows fill the map"),
        (fused.STAGE, "FORWARD_BYTES", -4, "weights and images"),
        (fused.STAGE, "BACKWARD_BYTES", -16, "arrays of the backward pass"),
        (fused.STAGE, "M_TILES", -1, "every row has a block"),
        (fused.STAGE, "PARAMETERS", 1, "a partial sum has a gradient of each weight"),
        (ring.STAGE, "PITCH", 4, "source rows without bank conflicts"),
        (ring.STAGE, "FORWARD_RING", -1, "room for the rows in use"),
        (ring.STAGE, "RING", -1, "room for the rows in use"),
        (ring.STAGE, "ERROR_RING", -1, "room for the rows of a step"),
        (ring.STAGE, "ERROR_COLUMNS", -1, "the columns that reach a tile"),
        (ring.STAGE, "ARENA_FLOATS", -1, "room for"),
        (ring.STAGE, "CHUNK_CHANNELS", -1, "every source column and channel has a unit"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_kernels_refuse_a_size_that_is_off(
    stage: Stage, size: str, change: int, message: str
) -> None:
    source = stage.engine.source_on(stage, Setup(lenet5(), 16, learning_rate=0.1), H100.limits)
    assert messages(source) == ""
    wrong = re.sub(rf"\b{size} = (\d+)", lambda found: f"{size} = {int(found[1]) + change}", source)
    assert wrong != source
    assert message in messages(wrong)


@pytest.mark.parametrize("stage", [fused.STAGE, ring.STAGE], ids=lambda stage: stage.name)
@pytest.mark.parametrize(
    ("size", "change", "message"),
    [
        ("PADDING_ROWS", -1, "every position sees elements of the padded source alone"),
        ("PADDING_COLUMNS", -1, "every position sees elements of the padded source alone"),
        ("ROWS", 1, "positions that no window covers are not computed"),
        ("COLUMNS", 1, "positions that no window covers are not computed"),
    ],
)
def test_kernels_refuse_positions_that_are_off(
    stage: Stage, size: str, change: int, message: str
) -> None:
    setup = Setup(fused_padding(), 16, learning_rate=0.1)
    source = stage.engine.source_on(stage, setup, H100.limits)
    assert messages(source) == ""
    wrong = re.sub(rf"\b{size} = (\d+)", lambda found: f"{size} = {int(found[1]) + change}", source)
    assert message in messages(wrong)
