"""The lessons of the page: one a stage, each with facts for its text and a chart as its evidence.

The text is in workflow/report/templates/lessons/STAGE.html.j2 and has no number of its own; the
sketch of the idea is workflow/report/sketches/STAGE.svg. A stage without these has no lesson.
"""

from dataclasses import dataclass

from cnnlib.exercises.catalogue import NAMES, Exercise, find_exercise
from cnnlib.paths import ROOT
from workflow.plotting import style, wording
from workflow.report.charts import CHARTS, Chart
from workflow.report.facts import Facts, facts
from workflow.report.rungs import Rung
from workflow.report.shown import Shown

TEXTS = ROOT / "workflow/report/templates/lessons"
SKETCHES = ROOT / "workflow/report/sketches"


@dataclass(frozen=True)
class Lesson:
    """The lesson of a stage."""

    stage: str
    title: str
    color: str
    rung: Rung
    chart: Chart | None
    facts: Facts
    exercise: Exercise | None = None
    sketch: str = ""


def lessons(shown: Shown) -> list[Lesson]:
    """The lessons of all stages that were measured and have one, in the ladder's order."""
    known = facts(shown)
    found = []
    for stage in shown.own_stages:
        if stage not in known.rungs or not (TEXTS / f"{stage}.html.j2").exists():
            continue
        sketch = SKETCHES / f"{stage}.svg"
        found.append(
            Lesson(
                stage,
                wording.title(stage),
                style.mark(stage).color,
                known.rungs[stage],
                CHARTS[stage](shown, known) if stage in CHARTS else None,
                known,
                find_exercise(stage) if stage in NAMES else None,
                sketch.read_text(encoding="utf-8") if sketch.exists() else "",
            )
        )
    return found
