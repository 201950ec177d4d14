"""How two measurements differ before any time is looked at: machine, software, code, settings.

Two folders are alike if nothing but the times may differ; whoever compares them should see first
what else does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

from cnnlib.comparing.results import Results, run_of

Kind = Literal["machine", "software", "code", "settings"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What differs, in the order in which it is shown."""

UNKNOWN = "unknown"
SHORT = 12
"""Digits of a commit or a digest that are shown."""
CLOCK_SHARE = 0.01
"""Median clocks of a stage that are as close as this, relative to each other, count as equal."""
FACTS: Mapping[str, Kind] = {
    "cpu": "machine",
    "cores": "machine",
    "cpu_quota": "machine",
    "system": "machine",
    "driver": "machine",
    "python": "software",
    "built": "software",
    "commit": "code",
}
"""Keys of run.json that are compared, each for its kind. Versions of libraries follow."""
NOT_SETTINGS = ("results",)
"""Keys of the config that say where results lie and not how they are measured."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same in both folders."""

    kind: Kind
    what: str
    a: str
    b: str


def differences(a: Results, b: Results) -> list[Difference]:
    """Everything that differs, or is known of one folder only, in the order of KINDS."""
    found = [*machines(a, b), *provenance(a, b), *clocks(a, b), *settings(a, b)]
    return sorted(found, key=lambda difference: KINDS.index(difference.kind))


def machines(a: Results, b: Results) -> Iterable[Difference]:
    """The devices that the rows name, by their kind."""
    for kind in sorted({key.device_kind for key in (*a.runs, *b.runs)}):
        names = [devices(each, kind) for each in (a, b)]
        if all(names):
            yield from unequal("machine", f"device ({kind})", names)


def devices(results: Results, kind: str) -> set[str]:
    """The devices of one kind that the rows name."""
    own = (run.devices for key, run in results.runs.items() if key.device_kind == kind)
    return set(chain.from_iterable(own))


def provenance(a: Results, b: Results) -> Iterable[Difference]:
    """The FACTS, and the versions of the libraries."""
    for name, kind in FACTS.items():
        yield from unequal(kind, name, [values(each, name) for each in (a, b)])
    versions = [library_versions(each) for each in (a, b)]
    for library in sorted(set(chain(*versions))):
        yield from unequal("software", library, [each.get(library, set()) for each in versions])


def unequal(kind: Kind, what: str, found: list[set[str]]) -> Iterable[Difference]:
    """A difference where two sets of values are not the same; the empty set is unknown."""
    if found[0] != found[1]:
        yield Difference(kind, what, *(listed(each) if each else UNKNOWN for each in found))


def values(results: Results, name: str) -> set[str]:
    """What the run.json files say of `name`; None counts as unknown."""
    facts: Iterable[Mapping[str, Any]] = results.facts
    found = {str(each[name]) for each in facts if each.get(name) not in (None, "")}
    return set(map(short_commit, found)) if name == "commit" else found


def short_commit(text: str) -> str:
    """A commit by its first digits, still with `+changes`."""
    return text[:SHORT] + text.partition("+")[1] + text.partition("+")[2]


def library_versions(results: Results) -> dict[str, set[str]]:
    """Library -> the versions that the run.json files name."""
    found: dict[str, set[str]] = {}
    facts: Iterable[Mapping[str, Any]] = results.facts
    for each in facts:
        libraries = each.get("libraries")
        for name, version in (libraries if isinstance(libraries, dict) else {}).items():
            found.setdefault(str(name), set()).add(str(version))
    return found


def clocks(a: Results, b: Results) -> Iterable[Difference]:
    """Stages whose multiprocessors ran at other clocks while they were timed."""
    for stage in sorted(a.clocks.keys() & b.clocks.keys()):
        first, second = a.clocks[stage], b.clocks[stage]
        if abs(first - second) > CLOCK_SHARE * max(first, second):
            what = f"clock, {stage}"
            yield Difference("machine", what, f"{first:.0f} MHz", f"{second:.0f} MHz")
    for results, other in ((a, b), (b, a)):
        if results.clocks and not other.clocks:
            known = listed({f"{clock:.0f} MHz" for clock in results.clocks.values()})
            sides = (known, UNKNOWN) if results is a else (UNKNOWN, known)
            yield Difference("machine", "clock", *sides)


def settings(a: Results, b: Results) -> Iterable[Difference]:
    """Settings of both configs that differ; where one has none, the digests that runs have."""
    if a.settings is not None and b.settings is not None:
        flat = [dict(flattened(each.settings or {})) for each in (a, b)]
        for name in sorted(set(chain(*flat))):
            if name.split(".")[0] not in NOT_SETTINGS and flat[0].get(name) != flat[1].get(name):
                first, second = (each.get(name, "not set") for each in flat)
                yield Difference("settings", name, first, second)
        return
    digests = [run_digests(each) for each in (a, b)]
    common = digests[0].keys() & digests[1].keys()
    for name in sorted(common):
        yield from unequal("settings", f"digest, {name}", [each[name] for each in digests])
    if not common and (a.settings is None) != (b.settings is None):
        sides = ("config.yaml" if each.settings is not None else UNKNOWN for each in (a, b))
        yield Difference("settings", "all", *sides)


def run_digests(results: Results) -> dict[str, set[str]]:
    """A stage on a network -> digests of the settings that decide what its runs measure."""
    found: dict[str, set[str]] = {}
    for facts in results.facts:
        run = run_of(facts)
        if run is not None and facts.get("settings"):
            name = f"{run.stage} ({run.network} on {run.dataset})"
            found.setdefault(name, set()).add(facts["settings"][:SHORT])
    return found


def flattened(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """(dotted name, value as text) for each leaf of nested settings; lists are leaves."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flattened(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value)


def listed(values: Iterable[str], most: int = 4) -> str:
    """The values in order, with commas; of more than `most`, how many others there are."""
    ordered = sorted(values)
    more = [f"{len(ordered) - most} more"] if len(ordered) > most else []
    return ", ".join([*ordered[:most], *more])
