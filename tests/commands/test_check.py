"""The command `check`."""

import dataclasses
from typing import Any

import pytest

from cnnlib import stages
from cnnlib.__main__ import main
from cnnlib.stages import naive
from cnnlib.validation.verdicts import Unjudged
from tests.support.command_line import Home
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


@pytest.mark.slow
def test_check(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.write(toy_config(sweep={"stages": ["naive", "gemm"], "batch_sizes": [1, 7]}))
    lines = [line.split() for line in home("check").splitlines()[1:]]
    assert [(line[0], line[3], line[5]) for line in lines] == [
        (stage, batch, "ok") for stage in ("naive", "gemm") for batch in ("1", "7")
    ]
    assert all(0 <= float(line[4]) <= 1 for line in lines)

    def slightly_wrong(self: Any, images: Any, labels: Any) -> Any:
        loss, gradient = original(self, images, labels)
        return loss, gradient * 1.001 if len(images) == 7 else gradient

    original = stages.gemm.STAGE.engine.gradient
    wrong = type("Wrong", (stages.gemm.STAGE.engine,), {"gradient": slightly_wrong})
    bad = dataclasses.replace(stages.gemm.STAGE, engine=wrong)
    monkeypatch.setattr(stages, "LADDER", (naive.STAGE, bad))
    capture = home.capture
    capture.readouterr()
    assert main(["check"]) == 1
    out, err = capture.readouterr()
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["ok", "ok", "ok", "FAILED"]
    assert "stage 'gemm' fails validation" in err

    def no_way_to_say(self: Any, images: Any, labels: Any) -> Any:
        raise Unjudged("network 'small' cannot be judged: for a reason")

    unjudged = type("Unjudged", (stages.gemm.STAGE.engine,), {"gradient": no_way_to_say})
    bad = dataclasses.replace(stages.gemm.STAGE, engine=unjudged)
    monkeypatch.setattr(stages, "LADDER", (naive.STAGE, bad))
    assert main(["check"]) == 1
    out, err = capture.readouterr()
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["ok", "ok"] + 2 * ["unjudged"]
    assert err == "network 'small' cannot be judged: for a reason\n"
