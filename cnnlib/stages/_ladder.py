"""Puts stages in the order in which one improves on another, from what their records say."""

from collections.abc import Collection, Iterator, Sequence

from cnnlib.engine import Stage


def in_order(
    stages: Sequence[Stage], unusable: Collection[str] = ()
) -> tuple[list[Stage], list[tuple[Stage, str]]]:
    """(the stages in the ladder's order, those that have no place in it and why).

    A stage follows the one that its `after` names. Where several follow the same one, those come
    first that have fewer behind themselves, so that a new stage comes between two others. A stage
    without `after`, or after one of the `unusable` names, follows none; of such stages, the one
    that has most behind itself comes first.
    """
    by_name: dict[str, Stage] = {}
    for stage in stages:
        by_name.setdefault(stage.name, stage)
    sound, wrong = [], []
    for stage in stages:
        problem = _problem(stage, by_name, unusable)
        if problem:
            wrong.append((stage, problem))
        else:
            sound.append(stage)
    followers: dict[int, list[Stage]] = {id(stage): [] for stage in sound}
    first: list[Stage] = []
    for stage in sound:
        followers.get(id(by_name.get(stage.after)), first).append(stage)

    def walk(stage: Stage) -> Iterator[Stage]:
        yield stage
        for each in sorted(followers[id(stage)], key=lambda each: (length(each), each.name)):
            yield from walk(each)

    def length(stage: Stage) -> int:
        return sum(1 for _ in walk(stage))

    roots = sorted(first, key=lambda stage: (-length(stage), stage.name))
    return [stage for root in roots for stage in walk(root)], wrong


def _problem(stage: Stage, by_name: dict[str, Stage], unusable: Collection[str]) -> str:
    """What is wrong with the stage's `after`; "" if nothing is."""
    way = [stage.name]
    while way[-1] in by_name and (name := by_name[way[-1]].after):
        way.append(name)
        if name == stage.name:
            return f"STAGE.after makes a circle: {' after '.join(way)}"
        if name in way[:-1]:
            break  # a circle of others
    if stage.after and stage.after not in by_name and stage.after not in unusable:
        return f"STAGE.after is {stage.after!r}, which is no stage; known: {', '.join(by_name)}"
    return ""
