"""The commands of the course: what is begun, hinted at, handed in and graded."""

import csv
import json

import pytest

from cnnlib.exercises.catalogue import NAMES, find_exercise
from tests.support.command_line import Home


def test_every_exercise_is_listed_with_its_points(home: Home) -> None:
    said = home("exercise", "list")
    for name in NAMES:
        exercise = find_exercise(name)
        assert f"{name}: {exercise.title}" in said
        for part in exercise.parts:
            assert f"  {part.name} ({part.points:g} point" in said


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_is_begun_with_a_page_and_hints(home: Home, name: str) -> None:
    assert f"check it: cnnlib exercise check exercise_{name}" in home("exercise", "start", name)
    folder = home.folder / f"exercise_{name}"
    page = (folder / "README.md").read_text(encoding="utf-8")
    exercise = find_exercise(name)
    for part in exercise.parts:
        text = (folder / part.file).read_text(encoding="utf-8")
        assert text.count(f"part {part.name}: not written yet") == 1
        assert f"# Part {part.name} (" in text or f"// Part {part.name} (" in text
        assert f"## {part.name}\n" in page
        solution = home("exercise", "solution", name, part.name)
        assert solution.strip() not in text
        for step, hint in enumerate(part.hints, 1):
            said = home("exercise", "hint", name, part.name, "--step", str(step))
            assert said == f"hint {step} of {len(part.hints)}: {hint}\n"
    home("exercise", "solution", name, "--out", "solution")
    for file in exercise.solution():
        assert (home.folder / "solution" / file).exists()


def test_many_submissions_are_graded_at_once(home: Home) -> None:
    home("exercise", "solution", "gemm", "--out", "class/anna")
    home("exercise", "start", "naive", "--out", "class/bert.b")
    text = (home.folder / "class/anna/my_gemm.py").read_text(encoding="utf-8")
    wrong = text.replace('self.gradients["bias"] += self._sums.sum(axis=0)', "pass")
    (home.folder / "class/carl.py").write_text(wrong, encoding="utf-8")
    (home.folder / "class/dora").mkdir()
    home("exercise", "solution", "naive", "--out", "class/emil")
    (home.folder / "class/emil/more.py").write_text(text, encoding="utf-8")
    said = home("exercise", "check", "class", "--csv", "out/grades.csv", "--json", "grades.json")
    assert "0 of 3  the gradient of the bias is missing: that of conv" in said
    with open(home.folder / "out/grades.csv", encoding="utf-8") as file:
        rows = {row["submission"]: row for row in csv.DictReader(file)}
    points = {name: (row["exercise"], row["points"], row["of"]) for name, row in rows.items()}
    assert points == {
        "anna": ("gemm", "10", "10"),
        "bert.b": ("naive", "0", "10"),
        "carl": ("gemm", "7", "10"),
        "dora": ("", "0", "0"),
        "emil": ("", "0", "0"),
    }
    assert "conv_backward 0: bias; conv_errors 2: right" in rows["carl"]["parts"]
    assert "no file of an exercise" in rows["dora"]["problem"]
    assert "files of exercises gemm and naive" in rows["emil"]["problem"]
    grades = json.loads((home.folder / "grades.json").read_text(encoding="utf-8"))
    assert [each["submission"] for each in grades] == list(rows)
    assert grades[2]["parts"][1]["word"] == "bias"
    said = home("exercise", "check", "class/bert.b", code=1)
    assert said == ""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("start", "tuned"), "there is no exercise 'tuned'; there are: naive, gemm, gemm_cuda"),
        (("start", "naive", "--out", "."), ". exists already; choose another folder with --out"),
        (("hint", "naive", "x"), "exercise naive has no part 'x'; it has: conv_forward, "),
        (("hint", "naive", "update", "--step", "3"), "--step 3: part update has hints 1 to 2"),
        (("solution", "naive", "update", "--out", "x"), "--out is for all files: leave out"),
        (("check", "nowhere"), "nowhere: there is no such file or folder"),
        (("check", "config.yaml"), "config.yaml: no file of an exercise; each begins with"),
        (("check", "."), ".: no file of an exercise; each begins with"),
    ],
)
def test_bad_input_is_one_line(home: Home, command: tuple[str, ...], said: str) -> None:
    assert home.fails("exercise", *command).startswith(f"error: {said}")
