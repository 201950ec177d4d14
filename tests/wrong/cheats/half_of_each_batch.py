"""Not all images: the second half of each batch is the first half again."""

from dataclasses import replace

import numpy as np

from cnnlib.stages import gemm


class Halves(gemm.STAGE.engine):
    def train(self, order, rates=None):
        size = self.setup.batch_size
        batches = np.reshape(order[: len(order) // size * size], (-1, size)).copy()
        batches[:, size // 2 :] = batches[:, : size - size // 2]
        return super().train(batches.ravel(), rates)

    def train_epoch(self, shuffle, rates=None):
        size = self.setup.batch_size
        return self.train(shuffle.indices()[: len(shuffle) // size * size], rates)


STAGE = replace(gemm.STAGE, name="half_of_each_batch", title="Halves", engine=Halves)
