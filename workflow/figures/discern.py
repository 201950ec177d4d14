"""The moment a digit is recognised: what each stage takes it for as its training proceeds.

One block for each of a few test images, an easy one and hard ones; a row for each stage and for the
quickest library in float32, and a column for each moment of training time at which a prediction has
changed. A cell shows the class that the stage predicts and its probability in percent, darker for a
higher one: blue is right, orange with a cross is wrong, grey means that the first batch is not
finished. A stage that has trained its last epoch keeps its prediction. All stages learn the same
from the same images up to rounding (figure parting), so only the moments differ: images seen times
the stage's time per image in whole epochs. Cells with a dashed frame are extrapolated: the
prediction is that of a quicker stage after as many images.
"""

from collections.abc import Sequence

import pandas as pd

from workflow.plotting import ladder, layout, reasons, recognition, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("predictions", "pictures", "epochs")

MOST, FEW = 8, 5
"""Columns, at most; with fewer than FEW, moments within a decade are shown too."""


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """Blocks of cells by time."""
    predictions, pictures, epochs = (tables[name] for name in TABLES)
    stages = set(ladder.own_rows(epochs)["stage"])
    own = recognition.one_run(ladder.with_best_library(predictions, epochs))
    completed = recognition.complete(own, epochs[epochs["stage"].isin(set(own["stage"]) | stages)])
    rows = recognition.beliefs(completed)
    rows = recognition.named(rows[rows["train_seconds"] > 0], pictures)
    if not len(rows):
        return layout.nothing(
            sheet, *recognition.NO_ROWS, reasons.left_out(ladder.own_rows(epochs))
        )
    times = moments(rows)
    blocks = recognition.blocks(sheet, rows, pictures, lambda line: beliefs_at(line, times))
    return recognition.draw_grid(
        sheet,
        blocks,
        [style.plain(time) for time in times],
        "after this much training time",
        title(rows),
        recognition.subtitle(rows, predictions),
        notes(rows),
        "first batch not finished" if rows["whole"].all() else "not known",
        recognition.left_out(predictions, epochs),
    )


def moments(rows: pd.DataFrame) -> list[float]:
    """Round times from the first batch of the quickest to the last of the slowest stage.

    Only those at which a prediction of an image that is shown has changed since the one before,
    since equal columns say nothing new; of too many, those with the most changes.
    """
    low, high = rows["train_seconds"].min(), rows["train_seconds"].max()
    of_images = [rows[rows["image_index"] == index] for index, _ in recognition.choose(rows)]
    found: list[float] = []
    for steps in ((1,), (1, 2, 5)):
        ticks = sorted({time * step for time in style.SECONDS for step in steps})
        later = [time for time in ticks if time >= high]
        times = [time for time in ticks if low <= time < high] + later[:1]
        lines = [beliefs_at(line, times) for of in of_images for line in recognition.lines(of)]
        columns = list(zip(*lines, strict=True))
        kept = [0]
        for place in range(1, len(columns)):
            if changes(columns[kept[-1]], columns[place]) or place == len(columns) - 1:
                kept.append(place)
        while len(kept) > MOST:
            inner = range(1, len(kept) - 1)
            del kept[min(inner, key=lambda at: changes(columns[kept[at - 1]], columns[kept[at]]))]
        found = [times[place] for place in kept]
        if len(found) >= FEW:
            break
    return found


Column = Sequence[recognition.Belief | None]


def changes(one: Column, other: Column) -> int:
    """How many predictions are of another class, or were not there."""
    return sum(
        (a.label if a else None) != (b.label if b else None)
        for a, b in zip(one, other, strict=True)
    )


def beliefs_at(line: pd.DataFrame, times: list[float]) -> list[recognition.Belief | None]:
    """The predictions of a stage for one image at these times."""
    ends, whole = line["train_seconds"].max(), line["whole"].iloc[-1]
    found = []
    for time in times:
        past = line[line["train_seconds"] <= time]
        # A trained network stays as it is; one whose training was cut short would have learned on.
        known = len(past) and (time <= ends or whole)
        found.append(recognition.belief_of(past.iloc[-1]) if known else None)
    return found


def title(rows: pd.DataFrame) -> str:
    """When the quickest and the slowest stage recognise the first of the images for good."""
    of_image = rows[rows["image_index"] == recognition.choose(rows)[0][0]]
    measured = of_image[of_image["device_kind"] != "emulated"]
    known = [
        recognition.known_from(line)
        for line in recognition.lines(measured if len(measured) else of_image)
    ]
    found = [row for row in known if row is not None]
    if not found:
        return f"No stage recognises this {of_image['label_name'].iloc[0]} for good"
    found.sort(key=lambda row: row["train_seconds"])
    what = f"this {found[0]['label_name']}"
    parts = [f"{wording.said(found[0]['stage'])} recognises {what} {recognition.after(found[0])}"]
    if len(found) > 1:
        parts.append(f"{wording.said(found[-1]['stage'])} {recognition.after(found[-1])}")
    return ", ".join(parts) + (f" ({wording.EMULATED})" if not len(measured) else "")


def notes(rows: pd.DataFrame) -> str:
    """A note on what counts as recognised, and on how cells were extrapolated."""
    text = (
        f"Recognised: right with at least {100 * recognition.SURE:.0f} % from then on; evaluated "
        "after 1, 2, 4, ... batches and after each epoch."
    )
    return f"{text}\n{recognition.notes(rows)}".rstrip()
