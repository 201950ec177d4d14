"""What must not be published: names of users and hosts, paths on a disk, ids of cards.

They get into results by the reasons of runs that failed, by stages and data sets of one's own, and
by variables that a scheduler sets.
"""

import contextlib
import getpass
import os
import platform
import re
import socket
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

USUAL = {"root", "user", "users", "admin", "localhost", "localdomain", "ubuntu", "debian", "runner"}
"""Names of users and hosts that say nothing about anyone, and may be words of the results."""
LEAST = 3
"""Letters of a name that is looked for; shorter ones are in every text."""
PATH = re.compile(
    r"(?:(?<=file://)|(?<=-[BIL])|(?<![\w.~:/-]))/(?!(?:usr|opt|lib|lib64|proc|sys|dev)/)"
    r"(?:[^\s/:,;'\"<>|()]+/)+"
)
"""The folders of an absolute path, also behind a compiler's -I, but for those that every machine
has.
"""
CARD = re.compile(r"\b(?:GPU|MIG)-[0-9a-f]{4,}(?:-[0-9a-f]+)+(?:/\d+)*", re.IGNORECASE)
"""What NVIDIA's tools name one card of all by, or one part of it."""


class Rule(NamedTuple):
    """One kind of private words."""

    what: str
    pattern: re.Pattern[str]
    instead: str
    is_name: bool = False
    """Whether it may be an ordinary word, such as the user name max."""


class Scrubber:
    """Takes private words out of texts, and counts what it took."""

    def __init__(
        self, users: Iterable[str], hosts: Iterable[str], homes: Iterable[str] = ()
    ) -> None:
        self.taken: Counter[str] = Counter()
        """What was removed, in words -> how often."""
        self._rules = [
            *(Rule("home folder", _folder(home), "") for home in _longest(homes)),
            Rule("path of this machine", PATH, ""),
            Rule("id of a card", CARD, "CARD"),
            *(Rule("host name", _word(host), "HOST") for host in _longest(hosts)),
            *(Rule("user name", _word(user), "USER", True) for user in _longest(users)),
        ]

    @classmethod
    def of_this_machine(cls, allowed: Collection[str] = ()) -> Self:
        """One that knows the user and the host of this process, but for `allowed` names."""
        users = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER")}
        with contextlib.suppress(KeyError, OSError):  # the user id may have no name
            users.add(getpass.getuser())
        hosts = {socket.gethostname(), platform.node()}
        hosts |= {host.partition(".")[0] for host in hosts}
        homes: set[str] = set()
        with contextlib.suppress(RuntimeError):
            homes = {str(Path.home())} - {"/"}
        users |= {Path(home).name for home in homes}
        return cls(users - set(allowed), hosts - set(allowed), homes)

    def text(self, text: str, names: bool = True) -> str:
        """`text` without anything private; names of users stay where they may be other words."""
        for rule in self._rules:
            if names or not rule.is_name:
                text, count = rule.pattern.subn(rule.instead, text)
                if count:
                    self.taken[rule.what] += count
        return text

    def facts(self, value: Any) -> Any:
        """The same of all texts in a value of JSON; keys and numbers stay."""
        return _each_text(value, self.text)

    def settings(self, value: Any) -> Any:
        """The same of a config, in which a user's name is looked for in paths alone."""
        return _each_text(value, lambda text: self.text(text, names="/" in text))

    def found_in(self, text: str, names: bool = False) -> str:
        """The first private thing that a text has, in words, or ""."""
        rules = (rule for rule in self._rules if names or not rule.is_name)
        return next((rule.what for rule in rules if rule.pattern.search(text)), "")


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON or YAML with all its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_text(inner, change) for key, inner in value.items()}
    return [_each_text(inner, change) for inner in value] if isinstance(value, list) else value


def _longest(names: Iterable[str]) -> list[str]:
    """Names worth looking for, those first that may hold others."""
    wanted = {name for name in names if len(name) >= LEAST and name.lower() not in USUAL}
    return sorted(wanted, key=lambda name: (-len(name), name))


def _word(name: str) -> re.Pattern[str]:
    """The name as a word of its own."""
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", re.IGNORECASE)


def _folder(path: str) -> re.Pattern[str]:
    """The path of a folder alone; at the beginning of others it is one of PATH."""
    return re.compile(rf"{re.escape(path)}(?![\w./-])")
