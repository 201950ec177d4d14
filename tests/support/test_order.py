"""Long tests begin first, in whichever of the tests' processes they run."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.order import longest_first, seconds

pytestmark = pytest.mark.quick


class Item:
    """What the order of a test depends on."""

    path = Path("test_letters.py")

    def __init__(
        self, name: str, *marks: pytest.Mark, fixtures: tuple[str, ...] = (), shared: str = ""
    ) -> None:
        self.name, self.marks, self.fixturenames = name, marks, fixtures
        made = {shared: [SimpleNamespace(scope="module")]} if shared else {}
        self._fixtureinfo = SimpleNamespace(name2fixturedefs=made)

    def iter_markers(self, name: str) -> list[pytest.Mark]:
        return [mark for mark in self.marks if mark.name == name]


def ordered(items: list[Item], processes: int) -> str:
    found = longest_first(items, processes, {"made"})  # type: ignore[arg-type]
    return "".join(item.name for item in found)


def test_long_tests_are_dealt_out_to_the_beginnings() -> None:
    slow, slower = pytest.mark.slow.mark, pytest.mark.slow(9).mark
    slowest = pytest.mark.slow(90).mark
    items = [Item(name) for name in "abcdefghijk"]
    items[1:1] = [Item("S", slow), Item("W", slowest, fixtures=("tmp_path", "made"))]
    items[9:9] = [Item("X", slower), Item("Z", slow, slowest), Item("T", slow)]
    assert [seconds(item) for item in items[:3]] == [0, 5, 90]  # type: ignore[arg-type]
    # Parts of 5, 5 and 6; what waits for something comes behind, in whichever part.
    assert ordered(items, 3) == "Zabcd" + "XWefg" + "SThijk"
    assert ordered(items, 16) == "ZXSTWabcdefghijk"


def test_long_tests_that_share_what_takes_long_stay_together() -> None:
    slow, slower = pytest.mark.slow.mark, pytest.mark.slow(9).mark
    items = [Item(name) for name in "abcdef"]
    items += [Item(name, slow, shared="typed") for name in "TUV"] + [Item("Z", slower)]
    assert ordered(items, 2) == "Zabcd" + "TUVef"
    assert ordered(items, 4) == "Za" + "bc" + "TUV" + "def"
    # Where no part has room for them all they come last.
    assert ordered(items, 5) == "Zabcdef" + "TUV"


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 20])
def test_each_test_is_run_once(processes: int) -> None:
    items = [Item(name) for name in "abc"] + [Item(name, pytest.mark.slow.mark) for name in "STUVW"]
    assert sorted(ordered(items, processes)) == sorted("abcSTUVW")
    assert ordered([], processes) == ""
