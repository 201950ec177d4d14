"""Which batch sizes learn: a speed counts for little where the training recognises less.

All stages run the same training, so the accuracy is that of a batch size: the median of the stages
of the ladder, or of libraries where there are no others.
"""

import pandas as pd

from workflow.plotting import frames, ladder

PLACE = ["dataset", "network", "batch_size"]
Cell = tuple[str, str, int]
WITHIN = 0.01
"""A batch size learns if its accuracy is at most this much below that of the best one."""


def by_batch(summary: pd.DataFrame) -> dict[Cell, float]:
    """The median of the stages' test accuracies at the end, where one has trained in full."""
    known = ladder.own_rows(summary[summary["test_accuracy"].notna()])
    return {
        (key[0], key[1], int(key[2])): float(group["test_accuracy"].median())
        for key, group in frames.groups(known, PLACE)
    }


def of_epochs(epochs: pd.DataFrame) -> pd.DataFrame:
    """The columns of the summary that this module reads, made from the table `epochs`."""
    line = [*PLACE, "stage"]
    good = epochs[epochs["status"] == "ok"]
    last = good.groupby([*line, "device", "repeat"], sort=False).tail(1)
    trained = last["epoch"].where(~last["extrapolated"].astype(bool), 0)
    return (
        last.assign(epochs_trained=trained)
        .groupby(line, sort=False)
        .agg(test_accuracy=("test_accuracy", "median"), epochs_trained=("epochs_trained", "max"))
        .reset_index()
    )


def learned(summary: pd.DataFrame) -> dict[Cell, bool]:
    """Whether each data set, network and batch size learns; one that nobody knows counts as such.

    `summary` is the table of that name, or another with its columns.
    """
    found = by_batch(summary)
    best: dict[tuple[str, str], float] = {}
    for (dataset, network, _), value in found.items():
        best[dataset, network] = max(value, best.get((dataset, network), value))
    keys = summary[PLACE].drop_duplicates().itertuples(index=False, name=None)
    return {key: key not in found or found[key] >= best[key[:2]] - WITHIN - 1e-9 for key in keys}


def of_learned(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of batch sizes that learn: those from which sentences are made."""
    learns = learned(summary)
    keys = summary[PLACE].itertuples(index=False, name=None)
    return summary[[learns[key] for key in keys]]


def epochs(summary: pd.DataFrame) -> str:
    """`2 epochs`: what the accuracies were reached in."""
    trained = summary.loc[summary["epochs_trained"] > 0, "epochs_trained"]
    count = int(trained.max()) if len(trained) else 0
    return f"{count} epoch{'' if count == 1 else 's'}"
