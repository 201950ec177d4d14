"""The order of the ladder, from what records say of the stage before them."""

import dataclasses

import pytest

from cnnlib.engine import Stage
from cnnlib.stages import LADDER, naive
from cnnlib.stages._ladder import in_order

pytestmark = pytest.mark.quick


def stage(name: str, after: str = "") -> Stage:
    return dataclasses.replace(naive.STAGE, name=name, after=after)


def names(*stages: Stage, unusable: tuple[str, ...] = ()) -> list[str]:
    ladder, wrong = in_order(stages, unusable)
    assert wrong == []
    return [each.name for each in ladder]


SHIPPED = ["naive", "gemm", "gemm_cuda", "fused", "ring", "tuned"]


def test_each_stage_of_the_ladder_names_the_one_before_it() -> None:
    """Stages of a user's own may come between the shipped ones."""
    shipped = [each for each in LADDER if each.name in SHIPPED]
    assert [each.name for each in shipped] == SHIPPED
    assert [each.after for each in shipped] == ["", *SHIPPED[:-1]]
    for place, each in enumerate(LADDER[1:], 1):
        assert each.after in [before.name for before in LADDER[:place]]
    assert tuple(in_order(LADDER[::-1])[0]) == LADDER


CHAIN = [stage("c", "b"), stage("b", "a"), stage("a")]


def test_stages_follow_those_that_they_name() -> None:
    assert names(*CHAIN) == ["a", "b", "c"]


def test_a_new_stage_comes_between_two_others() -> None:
    assert names(*CHAIN, stage("new", "a")) == ["a", "new", "b", "c"]
    assert names(*CHAIN, stage("new", "c")) == ["a", "b", "c", "new"]
    assert names(*CHAIN, stage("new", "a"), stage("newer", "new")) == [*"ab", "c", "new", "newer"]


def test_stages_without_one_before_come_last() -> None:
    assert names(stage("0"), *CHAIN) == ["a", "b", "c", "0"]


def test_those_behind_an_unusable_stage_remain() -> None:
    assert names(stage("d", "gone"), *CHAIN, unusable=("gone",)) == ["a", "b", "c", "d"]


def test_an_unknown_stage_before() -> None:
    new = stage("new", "bb")
    ladder, wrong = in_order([*CHAIN, new])
    assert [each.name for each in ladder] == ["a", "b", "c"]
    assert wrong == [(new, "STAGE.after is 'bb', which is no stage; known: c, b, a, new")]


@pytest.mark.parametrize(
    ("circle", "problem"),
    [
        ([stage("x", "x")], "x after x"),
        ([stage("x", "y"), stage("y", "x")], "x after y after x"),
        ([stage("x", "y"), stage("y", "z"), stage("z", "x")], "x after y after z after x"),
    ],
)
def test_a_circle_is_named_and_left_out(circle: list[Stage], problem: str) -> None:
    behind = stage("behind", "x")
    ladder, wrong = in_order([*circle, *CHAIN, behind])
    assert [each.name for each in ladder] == ["a", "b", "c", "behind"]
    assert [each for each, _ in wrong] == circle
    assert wrong[0][1] == f"STAGE.after makes a circle: {problem}"


def test_two_stages_of_one_name_have_their_followers_once() -> None:
    assert names(*CHAIN, stage("b", "a")) == ["a", "b", "b", "c"]
