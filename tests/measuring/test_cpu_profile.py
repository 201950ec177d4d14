"""The profile of a CPU stage names the functions that take the time."""

from pathlib import Path

import pytest

from cnnlib.datasets import Dataset
from cnnlib.errors import ConfigError
from cnnlib.measuring import schema
from cnnlib.measuring.cpu_profile import measure_cpu_profile, readable
from cnnlib.measuring.runs import Run
from cnnlib.stages import gemm
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("stage", "file"), [("naive", "layers/conv.py"), ("gemm", "gemm/conv.py")])
def test_the_profile_names_where_the_work_is(
    data: Dataset, tmp_path: Path, stage: str, file: str
) -> None:
    config = toy_config(measuring={"sample_seconds": 0.05})
    measure_cpu_profile(config, Run("toy", "small", stage, 8, 1), data, tmp_path / "f.csv")
    rows = schema.read(tmp_path / "f.csv", "cpu_profile")
    assert set(rows.stage) == {stage}
    assert rows.own_seconds.is_monotonic_decreasing
    assert (rows.total_seconds >= rows.own_seconds * 0.999).all()
    assert (rows.calls > 0).all()
    assert any(file in name for name in rows.function)
    assert [name for name in rows.function if name.startswith("/")] == []


def test_a_gpu_stage_has_no_functions(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'fused' spends its time on a GPU"):
        measure_cpu_profile(toy_config(), Run("toy", "small", "fused", 8, 1), data, tmp_path / "f")


def test_functions_are_named_without_the_machine() -> None:
    assert readable("~", 0, "<method 'sum' of 'numpy.ndarray' objects>") == (
        "method 'sum' of 'numpy.ndarray' objects"
    )
    assert readable("/usr/lib/python3/numpy/core.py", 7, "f") == "numpy/core.py:7 f"
    assert readable(gemm.__file__, 3, "f") == "cnnlib/stages/gemm/__init__.py:3 f"
