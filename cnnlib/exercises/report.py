"""Grades as a table for people, as JSON and as CSV."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cnnlib.errors import UserError, one_line
from cnnlib.exercises.grading import Grade, grade, name_of, read, total

COLUMNS = ("submission", "exercise", "points", "of", "parts", "problem")


@dataclass(frozen=True)
class Report:
    """What became of one submission."""

    submission: str
    exercise: str = ""
    grades: list[Grade] = field(default_factory=list)
    problem: str = ""
    """Why it could not be graded at all."""

    @property
    def of(self) -> float:
        """The points that there are."""
        return sum(each.part.points for each in self.grades)

    @property
    def is_right(self) -> bool:
        return bool(self.grades) and all(each.verdict.word == "right" for each in self.grades)

    @property
    def as_values(self) -> dict[str, object]:
        """What JSON gets."""
        parts = [
            {
                "part": each.part.name,
                "points": each.points,
                "of": each.part.points,
                "word": each.verdict.word,
                "text": each.verdict.text,
            }
            for each in self.grades
        ]
        return {
            "submission": self.submission,
            "exercise": self.exercise,
            "points": total(self.grades),
            "of": self.of,
            "problem": self.problem,
            "parts": parts,
        }


def graded(path: Path, *, alone: bool) -> Report:
    """The report on a submission; a problem with it is raised only if it is the only one."""
    try:
        submission = read(path)
        return Report(submission.name, submission.exercise.name, grade(submission))
    except UserError as error:
        if alone:
            raise
        return Report(name_of(path), problem=one_line(error))


def as_text(report: Report) -> str:
    """The rubric of a submission: a line for each part."""
    if report.problem:
        return f"{report.submission}: {report.problem}"
    wide = max(len(each.part.name) for each in report.grades)
    lines = [f"{report.submission}, exercise {report.exercise}"]
    for each in report.grades:
        points = f"{each.points:g} of {each.part.points:g}"
        lines.append(f"  {each.part.name:<{wide}}  {points:>8}  {each.verdict.text}")
    points = f"{total(report.grades):g} of {report.of:g}"
    return "\n".join([*lines, f"  {'total':<{wide}}  {points:>8}"])


def as_json(reports: Sequence[Report]) -> str:
    """A list of all submissions with their parts."""
    return json.dumps([each.as_values for each in reports], indent=2) + "\n"


def as_csv(reports: Sequence[Report]) -> str:
    """A row for each submission."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for each in reports:
        parts = "; ".join(f"{g.part.name} {g.points:g}: {g.verdict.word}" for g in each.grades)
        points = f"{total(each.grades):g}", f"{each.of:g}"
        table.writerow([each.submission, each.exercise, *points, parts, each.problem])
    return text.getvalue()
