"""Solutions pass; typical wrong answers and parts left open are named, each part by itself."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cnnlib.exercises import trial, writing
from cnnlib.exercises.catalogue import NAMES, Exercise, Part, find_exercise
from cnnlib.exercises.diagnosis import judge
from cnnlib.exercises.grading import Submission, grade, total

ANSWERS = Path(__file__).parent / "answers"

pytestmark = pytest.mark.slow

Answers = dict[str, dict[str, Any]]


def wrong_submissions(name: str) -> list[Answers]:
    """Part -> one of its wrong answers, until all answers have had their turn."""
    text = (ANSWERS / f"{name}.toml").read_text(encoding="utf-8")
    found: list[Answers] = []
    for answer in tomllib.loads(text)["answer"]:
        free = [each for each in found if answer["part"] not in each]
        if not free:
            free = [{}]
            found += free
        free[0][answer["part"]] = answer
    return found


def changed(exercise: Exercise, part: Part, text: str, answer: dict[str, Any] | None) -> str:
    """The file with a wrong answer in the place of a part, or with the part left open."""
    body = part.find(text)
    if answer is None:
        return part.put(writing.hole(exercise, part, body.returns), text)
    lines = text[body.start : body.end]
    assert lines.count(answer["old"]) == 1, f"{part.name}: {answer['what']}\n{lines}"
    return text[: body.start] + lines.replace(answer["old"], answer["new"]) + text[body.end :]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes_and_wrong_answers_are_named(name: str) -> None:
    exercise = find_exercise(name)
    grades = grade(Submission("solution", exercise, exercise.solution(), ()))
    assert [each.verdict.text for each in grades] == ["right"] * len(exercise.parts)
    assert total(grades) == exercise.points == 10
    for answers in wrong_submissions(name):
        files, expected = exercise.solution(), {}
        for part in exercise.parts:
            answer = answers.get(part.name)
            files[part.file] = changed(exercise, part, files[part.file], answer)
            expected[part.name] = answer["word"] if answer else "open"
        grades = grade(Submission("wrong", exercise, files, ()))
        found = {each.part.name: each.verdict for each in grades}
        assert {part: each.word for part, each in found.items()} == expected, found


@pytest.mark.parametrize("name", NAMES)
def test_parts_left_open_are_worth_nothing(name: str) -> None:
    exercise = find_exercise(name)
    grades = grade(Submission("open", exercise, writing.with_holes(exercise), ()))
    assert {each.verdict.word for each in grades} == {"open"}
    assert total(grades) == 0


@pytest.mark.parametrize("name", ["naive", "fused"])
def test_what_is_left_open_says_which_part_it_is(name: str, tmp_path: Path) -> None:
    exercise = find_exercise(name)
    writing.start(exercise, tmp_path / "begun")
    with trial.worker_for(tmp_path / "begun" / exercise.main) as worker:
        found = trial.attempt(worker, exercise)
    part = re.search(rf"exercise {name}, part (\w+): not written yet", found.problem)
    assert part is not None
    assert part[1] in [each.name for each in exercise.parts]
    assert judge(exercise, found).word == "open"
