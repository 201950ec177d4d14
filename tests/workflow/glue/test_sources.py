"""The files that stages, figures and measurements are made of, found by what they import."""

from pathlib import Path

import pytest

from cnnlib.paths import ROOT
from cnnlib.stages import LADDER
from workflow.glue import modules, sources

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("stage", [stage.name for stage in LADDER])
def test_a_stage_is_made_of_its_own_files(stage: str) -> None:
    files = sources.stage_sources(stage)
    assert {f"cnnlib/stages/{stage}.py", f"cnnlib/stages/{stage}/__init__.py"} & set(files)
    shared = {"cnnlib/measuring/run.py", "cnnlib/training/loop.py", "cnnlib/layers/conv.py"}
    assert shared <= set(files)
    assert all((ROOT / name).is_file() for name in files)
    on_gpu = next(s.runs_on for s in LADDER if s.name == stage) == "cuda"
    assert any(name.startswith("kernels/") for name in files) == on_gpu
    assert any(name.startswith("cnnlib/device/") for name in files) == on_gpu


def test_a_stage_is_not_made_of_the_other_stages() -> None:
    assert "cnnlib/stages/gemm/__init__.py" not in sources.stage_sources("naive")
    assert "cnnlib/stages/naive.py" not in sources.stage_sources("gemm")


def test_what_is_left_out_is_there() -> None:
    """A renamed module would silently count again."""
    for name in (*sources.PLUMBING, *sources.JUDGES, sources.STAGES, sources.DEVICE):
        assert sources.module_file(name) is not None, name


@pytest.mark.parametrize("figure", modules.names("figures"))
def test_a_figure_is_made_of_what_it_imports(figure: str) -> None:
    wildcards = {"figure": figure}
    files = sources.code_of("workflow/plotting/draw.py", "workflow/figures/{figure}.py")(wildcards)
    plotting = {f"workflow/plotting/{name}.py" for name in ("draw", "layout", "style", "wording")}
    assert {f"workflow/figures/{figure}.py", *plotting} <= set(files)
    assert all(name.startswith("workflow/") for name in files)
    assert [name for name in files if name.startswith("workflow/figures/")] == [
        f"workflow/figures/{figure}.py"
    ]


def test_a_measurement_is_made_of_its_kernels_and_modules() -> None:
    files = sources.code_of("cnnlib/probes/__init__.py", "kernels/probes.cuh")({})
    assert {"cnnlib/probes/gpu.py", "kernels/probes.cuh"} <= set(files)
    assert not any(name.startswith(("cnnlib/stages/", "cnnlib/device/")) for name in files)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stages whose kernels have the same names, in folders of their own."""
    folder = tmp_path / "kernels"
    for stage in ("tuned", "fused"):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "conv.cuh").write_text('#include "../grid.cuh"\n#include "sum.cuh"\n')
        (folder / stage / "sum.cuh").write_text("")
    (folder / "grid.cuh").write_text('#include "portable.cuh"\n')
    (folder / "portable.cuh").write_text("")
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setattr(sources, "KERNELS", folder)
    sources.kernel_files.cache_clear()
    return folder


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('NAME = "tuned/conv.cuh"', ["grid", "portable", "tuned/conv", "tuned/sum"]),
        ('NAME = "kernels/fused/sum.cuh"', ["fused/sum"]),
        ("SOURCE = '#include \"grid.cuh\"'", ["grid", "portable"]),
        ('NAME = f"{folder}/sum.cuh"', ["fused/sum", "tuned/sum"]),
        ('NAMES = "other.cuh", "tuned/other.cuh"', []),
        ('"""As fused/sum.cuh does."""  # and grid.cuh', []),
    ],
    ids=["path", "from the top", "without a folder", "unclear", "unknown", "mentioned"],
)
def test_kernels_are_found_by_path(kernels: Path, text: str, found: list[str]) -> None:
    module = kernels.parent / "module.py"
    module.write_text(text)
    names = [str(p.relative_to(kernels).with_suffix("")) for p in sources.kernels_of({module})]
    assert sorted(names) == found
