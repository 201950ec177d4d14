"""Every figure copes with tables that hold nothing, and says so."""

from pathlib import Path

import pytest
from matplotlib import pyplot

from cnnlib import records
from workflow import modules, style

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
