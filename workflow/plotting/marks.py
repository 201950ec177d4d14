"""The colour, mark and line of each stage: apart for colour-blind readers and in grey, too.

The colours of the ladder are in the records of its stages. Libraries are grey and have dashes,
since they are what the stages are compared with.
"""

from collections.abc import Collection
from dataclasses import dataclass

from cnnlib.peers import PEERS
from workflow.plotting import ladder


@dataclass(frozen=True)
class Mark:
    color: str
    marker: str


OTHERS = [
    Mark("#56b4e9", "*"),
    Mark("#a6761d", "X"),
    Mark("#e31a8c", "H"),
    Mark("#6b8e00", "*"),
    Mark("#b22222", "X"),
]
"""For stages without a colour or a mark of their own: none is that of a stage of the ladder."""


def mark(stage: str) -> Mark:
    """The colour and mark in the record of `stage`, or ones that its name picks.

    The name also picks them where an earlier stage has the same: a record made from another's by
    `replace` has its colours, but is not to be taken for it.
    """
    found: dict[str, Mark] = {}
    waiting = []
    for record in ladder.known():
        own = Mark(record.color, record.marker)
        if own.color and own.marker and own not in found.values():
            found.setdefault(record.name, own)
        elif record.name not in found:
            waiting.append(record)
    for record in sorted(waiting, key=lambda record: record.name):
        picked = _picked(record.name, found.values())
        colors = {other.color for other in found.values()}
        markers = {other.marker for other in found.values()}
        found[record.name] = Mark(
            picked.color if record.color in {"", *colors} else record.color,
            picked.marker if record.marker in {"", *markers} else record.marker,
        )
    return found.get(stage) or _picked(stage, found.values())


def _picked(name: str, taken: Collection[Mark]) -> Mark:
    """One of OTHERS: the first that is free, counted from a place that the name gives."""
    first = sum(name.encode()) % len(OTHERS)
    in_turn = [*OTHERS[first:], *OTHERS[:first]]
    return next((each for each in in_turn if each not in taken), in_turn[0])


DASHES = (
    (1.0, 1.4),
    (3.5, 1.6),
    (7.0, 1.8),
    (5.0, 1.5, 1.0, 1.5),
    (8.0, 1.5, 1.0, 1.5, 1.0, 1.5),
    (3.5, 1.2, 3.5, 1.2, 1.0, 1.2),
)
"""Lines of the libraries, in the order of PEERS: these have one colour."""

Dashes = str | tuple[float, tuple[float, ...]]
"""A line style of matplotlib."""


def dashes(stage: str, emulated: bool = False) -> Dashes:
    """The line of `stage`: solid, dashed if it is emulated, with dashes of its own for a peer."""
    names = [peer.name for peer in PEERS]
    if stage in names:
        return (0, DASHES[names.index(stage) % len(DASHES)])
    return (0, (4.0, 2.0)) if emulated else "-"
