"""What all tests share: figures without a screen, and `gpu` tests only where a GPU can be used."""

import os

import pytest

os.environ["MPLBACKEND"] = "Agg"  # programs that tests start inherit it


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        from cnnlib.device.cuda import missing_parts

        if missing := missing_parts():
            pytest.skip("; ".join(missing))
