"""Lower precision unsaid: `train` keeps weights as half-precision numbers, `gradient` does not."""

from dataclasses import replace

import numpy as np

from cnnlib.stages import gemm


class Half(gemm.STAGE.engine):
    def train(self, order, rates=None):
        size = self.setup.batch_size
        steps = len(order) // size
        due = self.rates_of(steps, rates)
        losses = []
        for step in range(steps):
            whole = self.parameters
            half = whole.astype(np.float16).astype(np.float32)
            self.parameters = half
            part = order[step * size : (step + 1) * size]
            losses.append(super().train(part, due[step : step + 1]))
            # the steps add up in full precision, as is usual with such training
            self.parameters = whole + (self.parameters - half)
        return float(np.mean(losses))

    def train_epoch(self, shuffle, rates=None):
        size = self.setup.batch_size
        return self.train(shuffle.indices()[: len(shuffle) // size * size], rates)


STAGE = replace(gemm.STAGE, name="half_precision", title="Half", engine=Half)
