"""The order of the stages in every figure and table, and which of them are the ladder's own."""

from collections.abc import Iterable

import pandas as pd

from cnnlib.peers import PEERS
from cnnlib.stages import ALL

NAMES_OF_PEERS = {stage.name for stage in PEERS}


def ordered(stages: Iterable[str]) -> list[str]:
    """Names of stages, each once: the ladder, its variants, peers, then unknown ones by name."""
    known = [stage.name for stage in ALL]
    present = set(stages)
    return [name for name in known if name in present] + sorted(present - set(known))


def own_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows without those of peers, if any are left: for figures where peers are too many lines."""
    own = rows[~rows["stage"].isin(NAMES_OF_PEERS)]
    return own if len(own) else rows
