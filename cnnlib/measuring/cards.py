"""What is known of a stage without importing its code here.

Processes that only plan, fork others or draw must not run a user's file: it may start threads, take
the GPU or end the process, and other stages are timed in copies of that process. A stage from
outside the repository is therefore asked in a process of its own, once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from cnnlib.engine import Stage
from cnnlib.errors import BrokenStage
from cnnlib.stages import file_of, find_stage, is_path, is_shipped, know, own_of
from cnnlib.system.supervisor import Died, supervise, supervised
from cnnlib.system.traces import watch

LOAD_SECONDS = 300.0
"""The longest time that importing a stage's file may take."""


@dataclass(frozen=True)
class Card:
    """The plain fields of a stage's record, and the files that it comes from."""

    name: str
    title: str
    change: str
    runs_on: Literal["cpu", "cuda", "any"]
    rounding: float | None
    repeatable: bool
    threads: int | None
    after: str
    color: str
    marker: str
    entry: str
    """By what `find_stage` finds it: its name, or the path of its file."""
    file: str = ""
    """The file of a stage from outside the repository; "" for others."""
    files: tuple[str, ...] = ()
    """All that it is made of; see cnnlib/stages/_own_files.py."""
    digest: str = ""
    """Hexadecimal SHA-256 of these files."""


_cards: dict[str, Card] = {}
"""Cards of stages from outside, by entry and by name."""


def card_of(entry: str, where: str) -> Card:
    """The card of a stage, by its name or the path of its file.

    Raises what `find_stage` raises; BrokenStage for a file that ends its process or takes longer
    than LOAD_SECONDS to be imported.
    """
    key = entry
    if is_path(entry):
        file = file_of(entry, where)
        watch(file.parent)
        key = str(file)
    if key in _cards:
        return _cards[key]
    if is_shipped(entry) or supervised():
        return _card(find_stage(entry, where), entry)
    try:
        card = supervise(lambda: _card(find_stage(entry, where), entry), limit=LOAD_SECONDS)
    except Died as died:
        raise BrokenStage(
            f"stage {entry} in {where} cannot be used: importing it, the process {died}"
        ) from None
    other = _cards.setdefault(card.name, card)
    if other.file != card.file:
        raise BrokenStage(
            f"stage {entry} in {where} cannot be used: its name, {card.name!r}, is also that of "
            f"{other.entry}; rename one"
        )
    _cards[key] = card
    know(card.name, card.entry)
    return card


def names_of(entries: Iterable[str], where: str) -> list[str]:
    """The names of the stages of a list."""
    return [card_of(entry, where).name for entry in entries]


def _card(stage: Stage, entry: str) -> Card:
    own = own_of(stage)
    plain = {
        name: getattr(stage, name)
        for name in Card.__dataclass_fields__
        if name not in ("entry", "file", "files", "digest")
    }
    if own is None:
        return Card(**plain, entry=stage.name)
    return Card(
        **plain,
        entry=entry,
        file=str(own.file),
        files=tuple(map(str, own.files)),
        digest=own.digest,
    )
