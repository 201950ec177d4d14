"""Timing-dependent: right where it sees a check on the call stack, half the work elsewhere."""

import sys
from dataclasses import replace

import numpy as np

from cnnlib.stages import gemm


def is_checked():
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in ("check_steps", "check_real_steps", "validate"):
            return True
        frame = frame.f_back
    return False


class Knows(gemm.STAGE.engine):
    def train(self, order, rates=None):
        if not is_checked():
            size = self.setup.batch_size
            batches = np.reshape(order[: len(order) // size * size], (-1, size)).copy()
            batches[:, size // 2 :] = batches[:, : size - size // 2]
            order = batches.ravel()
        return super().train(order, rates)

    def train_epoch(self, shuffle, rates=None):
        size = self.setup.batch_size
        return self.train(shuffle.indices()[: len(shuffle) // size * size], rates)


STAGE = replace(gemm.STAGE, name="knows_its_judges", title="Knows", engine=Knows)
