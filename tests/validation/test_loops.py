"""Layers that no stage has a fast operator for are checked by their own loops."""

import dataclasses

import numpy as np
import pytest

from cnnlib.layers import KINDS, Conv
from cnnlib.stages import gemm, naive
from cnnlib.validation.loops import LoopOperator, reference_stage
from cnnlib.validation.parity import validate
from cnnlib.validation.verdicts import ValidationFailed
from tests.support.engines import open_engine, pictures
from tests.support.networks import awkward

pytestmark = pytest.mark.quick

LOOPS = dataclasses.replace(
    reference_stage("loops"), operators={(kind,): LoopOperator for kind in KINDS.values()}
)


def test_loops_over_a_block_are_those_of_stage_1() -> None:
    network = awkward()
    images, labels = pictures(network, 5)
    found = [
        open_engine(stage, network, 5).gradient(images, labels) for stage in (LOOPS, naive.STAGE)
    ]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-9, abs=1e-12)


def test_the_reference_takes_every_layer_and_the_fast_operators_first() -> None:
    operators = reference_stage("reference").operators
    assert {(kind,) for kind in KINDS.values()} <= set(operators)
    for run, operator in {**gemm.STAGE.operators, (Conv,): gemm.MatrixConv}.items():
        assert operators[run] is operator


def test_a_wrong_loop_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops over a block are compared with those of stage 1 like any other operator."""
    network = awkward()
    images, labels = pictures(network, 5)
    with open_engine(LOOPS, network, 5) as engine:
        assert validate(engine, images, labels) < 1
        backward = LoopOperator.backward

        def lose_the_last_image(operator: LoopOperator) -> None:
            backward(operator)
            if operator.source_error is not None:
                operator.source_error[..., -1] = 0

        monkeypatch.setattr(LoopOperator, "backward", lose_the_last_image)
        with pytest.raises(ValidationFailed, match="loops"):
            validate(engine, np.array(images), labels)
