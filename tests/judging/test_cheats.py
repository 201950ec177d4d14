"""Each known way to look fast is a file of tests/wrong/cheats, and the judge rejects it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cnnlib.config import Config
from cnnlib.datasets import Dataset, load
from cnnlib.errors import one_line
from cnnlib.judging.judgement import PARTS, REJECTING, Judgement, Wanted
from tests.support.judged import judged_files

CHEATS = Path(__file__).parents[1] / "wrong" / "cheats"
# The part that rejects a cheat, and a word of why. Most fail several checks; this is one of them.
EXPECTED = {
    "another_learning_rate": ("check", "mean loss of 3 steps"),
    "cached_outputs": ("tricks", "the logits of a batch is off"),
    "disarms_the_checks": ("check", "loss at batch size"),
    "generous_tolerance": ("tricks", "slack=10000"),
    "half_of_each_batch": ("check", "mean loss of 3 steps"),
    "half_precision": ("tricks", "this step alone matters"),
    "knows_its_judges": ("check", "mean loss of 3 steps"),
    "left_for_the_reader": ("tricks", "mean loss"),
    "left_in_a_thread": ("check", "mean loss of 3 steps"),
    "remembers_trainings": ("tricks", "it remembers"),
    "right_on_few_images": ("times", "this step alone matters"),
    "skips_late_steps": ("tricks", "this step alone matters"),
    "slows_the_clock": ("tricks", "in its process time.perf_counter runs 0."),
    "works_ahead": ("tricks", "cores busy"),
    "works_ahead_in_a_process": ("tricks", "cores busy"),
    "wrong_losses": ("check", "mean loss of 3 steps"),
}


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Dataset]:
    config, file = judged_files(tmp_path_factory.mktemp("judge"))
    return config, load("toy", file, config.datasets["toy"])


@pytest.fixture
def judgement(course: tuple[Config, Dataset], tmp_path: Path) -> Callable[[str], Judgement]:
    """A judgement of a stage that has not begun."""
    config, data = course
    network = config.network("small", "toy", "test")

    def judgement(stage: str) -> Judgement:
        wanted = Wanted(stage, "toy", network, 16, 2, None, seed=5)
        return Judgement(config, wanted, data, tmp_path, lambda line: None)

    return judgement


def test_every_cheat_is_expected() -> None:
    assert {path.stem for path in CHEATS.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_is_rejected(judgement: Callable[[str], Judgement], name: str) -> None:
    part, why = EXPECTED[name]
    judged = judgement(str(CHEATS / f"{name}.py"))
    judged.open()
    with pytest.raises(REJECTING) as caught:
        PARTS[part](judged)
    assert why in one_line(caught.value)


def test_an_honest_stage_passes_the_same(judgement: Callable[[str], Judgement]) -> None:
    judged = judgement("gemm")
    judged.open()
    for part in ("check", "tricks"):
        assert PARTS[part](judged)[0] == "right"
    assert PARTS["times"](judged)[0] == "measured"
