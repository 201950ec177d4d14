"""The examples of docs/extending/ work as they are written."""

import dataclasses
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from matplotlib import pyplot

from cnnlib import datasets
from cnnlib.__main__ import main
from cnnlib.config import check_dataset, load_config
from cnnlib.device import Device
from cnnlib.engine.stage import plan
from cnnlib.layers import FUNCTIONS, KINDS, Activation, activation
from cnnlib.network import parse_layers
from cnnlib.paths import KERNELS, ROOT
from cnnlib.stages import _loading, gemm, gemm_cuda, naive
from cnnlib.stages.gemm import elementwise
from cnnlib.validation.parity import validate
from tests.support import formats
from tests.support.engines import open_engine, pictures
from tests.support.mirrors import write_files
from tests.support.networks import build, lenet5
from workflow.glue import modules
from workflow.plotting.layout import Sheet

pytestmark = pytest.mark.quick

TABLES = ROOT / "results/reference/nvidia-h100/tables"


def examples(page: str, language: str = "python") -> list[str]:
    text = (ROOT / f"docs/extending/{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


def run(code: str, name: str, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a module of this text defines."""
    found = {"__name__": name, **(namespace or {})}
    exec(compile(code, f"docs/extending/{name}", "exec"), found)
    return found


def serve(monkeypatch: pytest.MonkeyPatch, folder: str, name: str, example: dict[str, Any]) -> None:
    """Let modules.load find the example, as if it were a file of workflow/<folder>."""
    module = ModuleType(f"workflow.{folder}.{name}")
    vars(module).update(example)
    load = modules.load

    def find(where: str, what: str) -> ModuleType:
        return module if (where, what) == (folder, name) else load(where, what)

    monkeypatch.setattr(modules, "load", find)


def test_a_stage() -> None:
    (code,) = examples("stage")
    stage = run(code, "ring_gemm")["STAGE"]
    assert _loading.fault(stage) == ""
    operators = {planned.name: planned.operator for planned in plan(stage, lenet5())}
    assert operators["dense1"] is gemm_cuda.GemmDense


@pytest.fixture
def leaky_relu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the layer, and stage 1 as it is when it finds the module in its folder."""
    module = ModuleType("cnnlib.layers.leaky_relu")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(examples("layer")[0], vars(module))
    monkeypatch.setitem(KINDS, "leaky_relu", module.LeakyRelu)
    operators = {**naive.STAGE.operators, (module.LeakyRelu,): naive.Loops}
    monkeypatch.setattr(naive, "STAGE", dataclasses.replace(naive.STAGE, operators=operators))
    return module


def test_a_layer(leaky_relu: ModuleType) -> None:
    tests = run(examples("layer")[1], "test_leaky_relu")
    tests["test_by_hand"]()
    tests["test_finite_differences"]()
    (settings,) = map(yaml.safe_load, examples("layer", "yaml"))
    layers = parse_layers("mine", settings["networks"]["mine"])
    assert leaky_relu.LeakyRelu(slope=0.01) in layers


def test_a_fast_operator(leaky_relu: ModuleType) -> None:
    namespace = {**vars(elementwise), "LeakyRelu": leaky_relu.LeakyRelu}
    operator = run(examples("layer")[2], "gemm", namespace)["WholeLeakyRelu"]
    operators = {**gemm.STAGE.operators, (leaky_relu.LeakyRelu,): operator}
    stage = dataclasses.replace(gemm.STAGE, operators=operators)
    layers = [{"conv": {"maps": 2, "kernel": 3}}, {"leaky_relu": 0.1}, {"dense": 3}]
    network = build("leaky", (1, 6, 6), 3, layers)
    images, labels = pictures(network, 4)
    with open_engine(stage, network, 4) as fast, open_engine(naive.STAGE, network, 4) as loops:
        found, right = (engine.gradient(images, labels)[1] for engine in (fast, loops))
        assert found == pytest.approx(right, rel=1e-4, abs=1e-6)


def copied_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of kernels/ from which kernels are made for the rest of the test."""
    kernels = folder / "kernels"
    shutil.copytree(KERNELS, kernels)
    monkeypatch.setenv("CNNLIB_KERNELS", str(kernels))
    return kernels


def test_a_fast_operator_on_a_gpu(
    leaky_relu: ModuleType, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = copied_kernels(tmp_path, monkeypatch)
    (text,) = [code for code in examples("layer", "cuda") if "#pragma once" in code]
    (kernels / "gemm/leaky_relu.cuh").write_text(text, encoding="utf-8")
    kind = leaky_relu.LeakyRelu
    namespace = {**vars(gemm_cuda), "LeakyRelu": kind}
    operator = run(examples("layer")[3], "gemm_cuda", namespace)["GemmLeakyRelu"]
    operators = {**gemm_cuda.STAGE.operators, (kind,): operator}
    stage = dataclasses.replace(gemm_cuda.STAGE, operators=operators)
    layers = [{"conv": {"maps": 2, "kernel": 3}}, {"leaky_relu": 0.1}, {"dense": 3}]
    network = build("leaky", (1, 6, 6), 3, layers)
    images, labels = pictures(network, 4)
    with (
        open_engine(stage, network, 4, device) as fast,
        open_engine(naive.STAGE, network, 4) as loops,
    ):
        found, right = (engine.gradient(images, labels)[1] for engine in (fast, loops))
        assert found == pytest.approx(right, rel=1e-4, abs=1e-6)


def test_an_activation_function(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = run(f"FOUND = {{{examples('layer')[4]}}}", "activation", vars(activation))["FOUND"]
    monkeypatch.setitem(FUNCTIONS, "softplus", entry["softplus"])
    header = copied_kernels(tmp_path, monkeypatch) / "layers.cuh"
    (line,) = [code for code in examples("layer", "cuda") if code.startswith("  ENTRY(")]
    before, after = header.read_text(encoding="utf-8").split("\n\n#define ENUMERATOR", 1)
    header.write_text(f"{before} \\\n{line}\n#define ENUMERATOR{after}", encoding="utf-8")
    # The names that a config may use were fixed when the module was imported.
    softplus = Activation.model_construct(function="softplus")
    network = build("soft", (1, 6, 6), 3, [{"conv": {"maps": 2, "kernel": 3}}, {"dense": 3}])
    conv, dense = network.layers
    network = dataclasses.replace(network, layers=(conv, softplus, dense))
    for stage in (naive.STAGE, gemm.STAGE, gemm_cuda.STAGE):
        with open_engine(stage, network, 4, device) as engine:
            assert validate(engine, *pictures(network, 4)) < 1


def test_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    code, its_test = examples("table")
    example = run(code, "fastest")
    tables = modules.read_tables([TABLES / f"{name}.csv" for name in example["TABLES"]])
    fastest = example["make"](tables)
    assert list(fastest["batch_size"]) == [16 * 2**n for n in range(9)]
    assert set(fastest["stage"]) == {"tuned"}
    serve(monkeypatch, "tables", "fastest", example)
    run(its_test, "test_fastest")["test_the_stage_with_the_shortest_epoch"]()


def test_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    code, its_test = examples("figure")
    example = run(code, "epoch")
    assert len(example["__doc__"].split()) > 25
    tables = modules.read_tables([TABLES / f"{name}.csv" for name in example["TABLES"]])
    drawing = example["draw"](tables, Sheet())
    assert re.search(r"tuned trains an epoch in \d\.\d\d ms at batch 256", str(drawing))
    empty = {name: table[:0] for name, table in tables.items()}
    assert "There are no epochs to draw" in str(example["draw"](empty, Sheet()))
    serve(monkeypatch, "figures", "epoch", example)
    run(its_test, "test_epoch")["test_the_title_names_the_fastest_stage"]()
    pyplot.close("all")


def test_a_network(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    made_for = []
    for text in examples("network", "yaml"):
        mine.write_text(text)
        config = load_config([ROOT / "config.yaml", mine])
        assert config.network("small", "mnist", "the page").classes == 10
        made_for.append(config.networks["small"].input_shape)
    assert made_for == [None, [1, 28, 28]]


MADE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "birds": ("pictures", formats.pictures),
    "mine": ("data/mine", formats.npz),
    "held_out": ("data/mine", formats.npz),
    "digits": ("data/digits", lambda folder: write_files(folder)),
    "letters": ("data/letters", formats.emnist),
    "small": ("data/small", lambda folder: formats.cifar(folder, shape=(3, 32, 32))),
}
"""Data set of docs/own-data.md -> where its files lie, and what makes them."""


def with_checksums(settings: Any, folder: Path) -> Any:
    """The settings with the checksums of the files in place of the page's dots."""
    if isinstance(settings, dict):
        if settings.get("sha256") == "...":
            return settings | {"sha256": formats.sha(folder / settings["name"])}
        return {key: with_checksums(value, folder) for key, value in settings.items()}
    return (
        [with_checksums(each, folder) for each in settings]
        if isinstance(settings, list)
        else settings
    )


@pytest.mark.parametrize("name", MADE)
def test_your_own_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pages = [yaml.safe_load(text)["datasets"] for text in examples("../own-data", "yaml")]
    assert {each for page in pages for each in page} == set(MADE)
    where, make = MADE[name]
    make(Path(where))
    (settings,) = (page[name] for page in pages if name in page)
    settings = with_checksums(settings, Path(where))
    settings["mirrors"] = [m for m in settings.get("mirrors", []) if "url" not in m]
    if settings["kind"] == "folder":
        del settings["mirrors"]
    spec = check_dataset(name, settings)
    datasets.download(name, spec, "raw", lambda _: None)
    datasets.prepare(name, spec, "raw", "out.npz")
    data = datasets.load(name, "out.npz", spec)
    assert data.has_validation == (name == "held_out")
    assert data.train_images.shape[1:] == spec.shape


def test_the_command_that_prints_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    formats.pictures(Path("pictures"))
    (line,) = re.findall(r"(?m)^    python -m cnnlib (checksum .*)$", own_data())
    assert main(line.split()) == 0
    assert yaml.safe_load(capsys.readouterr().out)["datasets"]["birds"]["kind"] == "folder"


def own_data() -> str:
    return (ROOT / "docs/own-data.md").read_text(encoding="utf-8")
