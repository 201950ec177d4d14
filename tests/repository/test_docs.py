"""The documentation's links, quoted code and table of the README agree with the repository."""

import importlib
import inspect
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from pydantic import BaseModel

from cnnlib.config import Config, Measuring, Race, Sweep, Training
from cnnlib.datasets.sources import DataFile, Mirror
from cnnlib.datasets.specs import (
    ArrayOf,
    CifarFiles,
    CifarSpec,
    FolderSpec,
    IdxSpec,
    NpzArrays,
    NpzSpec,
    SyntheticSpec,
)
from cnnlib.exercises.catalogue import NAMES, find_exercise
from cnnlib.exercises.diagnosis import WORDS
from cnnlib.layers import DEFAULT_LOSS, FUNCTIONS, KINDS, LOSSES
from cnnlib.paths import ROOT
from tests.support.engines import SERVE_ALL

pytestmark = pytest.mark.quick

DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(path for path in DOCS.rglob("*.md") if "_build" not in path.parts),
        *(ROOT / folder / "README.md" for folder in ("kernels", "tests")),
    ]
)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def prose(page: Path) -> str:
    """The page without its blocks and spans of code."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    return re.sub(r"(?<!`)`[^`\n]+`(?!`)", "``", text)


def anchors(page: Path) -> set[str]:
    """What a link to one of its headings ends in, as GitHub writes it."""
    heads = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        where = page.parent / path if path else page
        assert where.exists(), f"{target} of {page.relative_to(ROOT)}"
        if anchor:
            assert anchor in anchors(where), f"{target} of {page.relative_to(ROOT)}"


@each_page
def test_tests_that_are_named_exist(page: Path) -> None:
    for target in re.findall(r"`(tests/[a-z0-9_/]+\.\w+)", page.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), f"{target} of {page.relative_to(ROOT)}"


@each_page
def test_quoted_code_is_there(page: Path) -> None:
    """literalinclude fails in `make docs` only; a change of the code should notice it sooner."""
    text = page.read_text(encoding="utf-8")
    for path, options in re.findall(r"```\{literalinclude\} (\S+)\n((?::.*\n)*)```", text):
        source = page.parent / path
        code = source.read_text(encoding="utf-8")
        position = 0
        for option, wanted in re.findall(r":([\w-]+): (.*)", options):
            if option in ("start-at", "end-before"):
                found = code.find(wanted.strip('"'), position)
                assert found >= 0, f"{page.relative_to(ROOT)} quotes {path} {option} {wanted!r}"
                position = found + 1
            elif option == "pyobject":
                *_, name = wanted.split(".")
                assert re.search(rf"(?m)^ *(def|class) {name}\b", code), f"{wanted} of {path}"


def test_every_page_is_reached() -> None:
    """A reader would not find a page that no table of contents names."""
    pages = [path for path in DOCS.rglob("*.md") if "_build" not in path.parts]
    named = {DOCS / "index.md"}
    for index in pages:
        for block in re.findall(r"(?ms)^```\{toctree\}\n(.*?)^```", index.read_text("utf-8")):
            named |= {index.parent / f"{line}.md" for line in block.split() if line[0] != ":"}
    assert set(pages) <= named


def test_pages_have_the_published_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    rewrite = importlib.import_module("rewrite")
    assert len(rewrite.published.ladder().splitlines()) == 8
    networks = rewrite.networks
    sizes = {*networks.lines()["batch_size"], *networks.others()["batch_size"]}
    assert rewrite.networks.short().splitlines()[0].count("`") == 2 * 7
    assert len(rewrite.networks.short().splitlines()) == 2 + len(sizes)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(rewrite.pages()) == 6
    for page in rewrite.pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        # where a page says something else, `python docs/_extensions/rewrite.py` writes it anew
        assert rewrite.written(text, page) == text, page
    # another number is found, wherever a line breaks, and put right
    other = readme.replace(rewrite.published.race().split()[0], "1.23", 1)
    other = other.replace("| batch |", "| batch size |", 1)
    assert other != readme
    assert rewrite.written(other, "README.md") == readme
    with pytest.raises(rewrite.Mismatch, match=r"README.md has 0 times: with a small network"):
        rewrite.written(readme.replace("trains for", "needs"), "README.md")


DO_NOT_FIT = {"fused": {"`pytorch_examples`", "`vgg6`"}}
"""Shipped networks for whose layers a stage of SERVE_ALL has operators, but not the memory."""


def test_the_table_of_layers_has_every_kind_of_layer_and_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    served = importlib.import_module("served")
    rows = list(served.layer_rows())
    words = " ".join(row.what for row in rows).replace("_", " ")
    for name in (*KINDS, *FUNCTIONS, *LOSSES):
        if name not in ("activation", DEFAULT_LOSS):
            assert name.replace("_", " ") in words
    networks = {row.what: row.reasons for row in served.network_rows()}
    assert {"`lenet5`", "`vgg6`"} <= networks.keys()
    plans = {row.what: row.plans["tuned"] for row in served.network_rows()}
    assert (plans["`lenet5`"], plans["`vgg6`"]) == ("persistent", "graph")
    for stage in SERVE_ALL:
        assert not any(row.reasons.get(stage) for row in rows)
        refused = {what: why[stage] for what, why in networks.items() if why.get(stage)}
        assert refused.keys() == DO_NOT_FIT.get(stage, set())
        assert all("shared memory, which takes" in why for why in refused.values())


def test_the_page_of_the_exercises_has_every_part_and_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    exercises = importlib.import_module("exercises")
    page, words = list(exercises.page()), "\n".join(exercises.words())
    for name in NAMES:
        exercise = find_exercise(name)
        assert f"## {name}: {exercise.title}" in page
        for part in exercise.parts:
            assert part.name in page
    for word, meaning in WORDS.items():
        assert f"| `{word}` | {meaning} |" in words


def test_the_readme_names_the_command_that_ci_calls() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    called = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "    make test " in readme
    assert re.search(r"(?m)^make test\b", called)
    assert len(readme.splitlines()) < 100  # two screens


def test_every_setting_says_what_it_is() -> None:
    """The configuration reference is made from these texts: an empty one is an empty cell."""
    sections: list[type[BaseModel]] = [
        *(Config, Sweep, Training, Measuring, Race),
        *(IdxSpec, NpzSpec, CifarSpec, FolderSpec, SyntheticSpec),
        *(DataFile, Mirror, NpzArrays, ArrayOf, CifarFiles),
        *KINDS.values(),
    ]
    for section in sections:
        models = [base for base in section.__mro__ if issubclass(base, BaseModel)]
        source = "".join(inspect.getsource(base) for base in models if base is not BaseModel)
        for name in section.model_fields:
            field = rf"(?m)^    {name}: [^\n]*(\n        [^\n]*|\n    [\])])*\n    \"\"\""
            assert re.search(field, source), f"{section.__name__}.{name}"


def test_the_example_of_the_api_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "api/index.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"(?ms)^```python\n(.*?)^```", text)
    exec(compile(example, "docs/api/index.md", "exec"), {})
    *epochs, last = capsys.readouterr().out.splitlines()
    assert len(epochs) == 3
    assert float(last.removeprefix("accuracy ")) > 0.95


def test_things_are_where_the_map_says() -> None:
    text = (DOCS / "where.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| [^|]+ \| `([\w./]+)`[^|]*\| `(\w+)` \|$", text)
    assert len(rows) == text.count("\n|") - 2
    for path, name in rows:
        code = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"\b{name}\b", code), f"{name} of {path}"
