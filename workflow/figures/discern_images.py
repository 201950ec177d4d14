"""What each stage takes the same few digits for, by the number of images trained on.

One block for each test image, a row for each stage and a column for each number of images that the
training has seen. A cell shows the class that the stage predicts and its probability in percent,
darker for a higher one: blue is right, orange with a cross is wrong, grey was not evaluated. All
stages perform the same computation, so columns should agree from top to bottom, up to rounding.
Training amplifies rounding, so late in a training the predictions of hard images may differ.
Nothing is taken from another stage here: a stage that was timed only for a while ends early, or has
no row.
"""

import pandas as pd

from workflow.plotting import ladder, layout, reasons, recognition, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("predictions", "pictures", "epochs")

MOST = 9
"""Columns, at most."""
CLOSE = 0.02
"""Probabilities that differ by less than this look the same."""


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """Blocks of cells by images seen."""
    predictions, pictures, epochs = (tables[name] for name in TABLES)
    own = recognition.one_run(ladder.own_rows(predictions))
    completed = recognition.complete(own, ladder.own_rows(epochs))
    rows = recognition.beliefs(completed[~completed["borrowed"]])
    rows = recognition.named(rows, pictures)
    if not len(rows):
        return layout.nothing(
            sheet, *recognition.NO_ROWS, reasons.left_out(ladder.own_rows(epochs))
        )
    counts = columns(rows)
    blocks = recognition.blocks(
        sheet, rows, pictures, lambda line: [belief_after(line, count) for count in counts]
    )
    return recognition.draw_grid(
        sheet,
        blocks,
        [f"{count:,}" for count in counts],
        "after training on this many images",
        title(rows),
        recognition.subtitle(rows, predictions),
        notes(rows, reasons.without_left_out(epochs)),
        "not evaluated",
        recognition.left_out(predictions, epochs),
    )


def columns(rows: pd.DataFrame) -> list[int]:
    """Numbers of images after which a stage was evaluated: all, or every twofold, or fourfold."""
    counts = sorted(set(recognition.longest(rows)["images"]))
    for factor in (1, 2, 4, 16, 256):
        kept = counts[:1]
        for count in counts[1:-1]:
            if count >= factor * kept[-1] and counts[-1] >= 1.4 * count:
                kept.append(count)
        if len(counts) > 1:
            kept.append(counts[-1])
        if len(kept) <= MOST:
            break
    return kept


def belief_after(line: pd.DataFrame, count: int) -> recognition.Belief | None:
    """The prediction of a stage after exactly so many images."""
    found = line[line["images"] == count]
    return recognition.belief_of(found.iloc[0]) if len(found) else None


def title(rows: pd.DataFrame) -> str:
    """The result in one sentence: how often all stages agree, and how closely."""
    found = recognition.compare(rows)
    if not len(found):
        return f"What {rows['stage'].iloc[0]} takes the images for"
    same, cases = int(found["same"].sum()), len(found)
    what = "always agree" if same == cases else f"agree in {same:,} of {cases:,} cases"
    text = f"After the same images all stages {what}: probabilities to within "
    apart = found.groupby("images")["apart"].max().cummax()
    close = apart[apart < CLOSE]
    if len(close) in (0, len(apart)):
        return text + points(apart.iloc[-1])
    early, late = points(close.iloc[-1]), points(apart.iloc[-1])
    return f"{text}{early} up to {close.index[-1]:,} images, {late} later"


def points(share: float) -> str:
    """`0.3 points`; the table has four decimals."""
    if share < 1e-4:
        return "0.01 points"
    number = wording.digits(100 * share, 1 if share < 0.1 else 2)
    return f"{number} point" if number == "1" else f"{number} points"


def notes(rows: pd.DataFrame, epochs: pd.DataFrame) -> str:
    """A note on how much is compared, and on stages in `epochs` that were not evaluated."""
    missing = sorted(
        set(recognition.one_run(ladder.own_rows(epochs))["stage"]) - set(rows["stage"])
    )
    found = recognition.compare(rows)
    parts = []
    if len(found):
        parts.append(
            f"Compared: {found['image_index'].nunique()} test images at "
            f"{found['images'].nunique()} moments, those shown and others; a case is an "
            "image at a moment. Points are percentage points."
        )
    if missing:
        parts.append(f"Not evaluated: {', '.join(missing)}.")
    return " ".join(parts)
