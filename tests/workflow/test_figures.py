"""Every figure copes with tables that hold nothing, and says so."""

from pathlib import Path

import pytest
from matplotlib import pyplot

from cnnlib import records
from workflow import modules, style
from workflow.draw import name_clips

RAW = [
    name
    for name in modules.names("figures")
    if set(modules.tables_read("figures", name)) <= set(records.TABLES)
]


@pytest.mark.parametrize("name", RAW)
def test_without_rows_it_is_said(name: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{table}.csv" for table in modules.tables_read("figures", name)]
    for path in paths:
        records.write(path, path.stem, [])
    style.apply()
    figure = modules.load("figures", name).draw(modules.read_tables(paths))
    texts = [text.get_text() for text in figure.texts]
    pyplot.close(figure)
    assert len(texts[0]) > 10
    assert not any("nan" in text for text in texts)
    assert not any(axes.has_data() for axes in figure.axes)


@pytest.mark.parametrize("name", modules.names("figures"))
def test_its_caption_says_what_to_see(name: str) -> None:
    caption = modules.docstring("figures", name)
    assert len(caption.split()) > 25
    assert caption.splitlines()[0].endswith(".")


def test_clip_paths_are_named_by_what_is_in_them() -> None:
    def svg(first: str, second: str) -> str:
        rect = '<rect x="1" y="2" width="3" height="4"/>'
        return (
            f'<g clip-path="url(#{first})"/><g clip-path="url(#{second})"/>\n<defs>\n'
            f'  <clipPath id="{first}">\n   {rect}\n  </clipPath>\n'
            f'  <clipPath id="{second}">\n   {rect.replace("1", "9")}\n  </clipPath>\n</defs>\n'
        )

    assert name_clips(svg("p1", "p2")) == name_clips(svg("pa", "pb"))
    assert name_clips(svg("p1", "p2")).count("<clipPath") == 2
    same = '<clipPath id="p{}">\n <rect x="1"/>\n</clipPath>\n<a clip-path="url(#p{})"/>\n'
    assert name_clips(same.format(1, 1) + same.format(2, 2)).count("<clipPath") == 1
