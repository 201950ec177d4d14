"""The page's glossary: words that a template asks for by `term`, and the list of all of them."""

import functools
import tomllib
from typing import NamedTuple

from markupsafe import Markup

from cnnlib.paths import ROOT

LIST = ROOT / "workflow/report/glossary.toml"


class Word(NamedTuple):
    """A word and what it means."""

    key: str
    word: str
    text: str


@functools.cache
def words() -> dict[str, Word]:
    """All words by their keys."""
    with LIST.open("rb") as file:
        found = tomllib.load(file)
    return {key: Word(key, each["word"], each["text"]) for key, each in found.items()}


def in_order() -> list[Word]:
    """All words, by what they are called."""
    return sorted(words().values(), key=lambda word: word.word.lower())


LINK = Markup('<a class="term" href="#term-{key}" title="{text}">{shown}</a>')


def term(key: str, shown: str = "") -> Markup:
    """A word of the text, with its meaning on hover and a link to it.

    KeyError for an unknown one.
    """
    word = words()[key]
    return LINK.format(key=key, text=word.text, shown=shown or word.word)
