"""Work left behind: `train` returns while a thread, as another stream would, goes on training."""

import threading
from dataclasses import replace

from cnnlib.stages import gemm

NAME = "left_in_a_thread"


class Later(gemm.STAGE.engine):
    thread = None

    def train(self, order, rates=None):
        self.wait()
        self.thread = threading.Thread(target=super().train, args=(order, rates))
        self.thread.start()
        return 1.0

    def train_epoch(self, shuffle, rates=None):
        size = self.setup.batch_size
        return self.train(shuffle.indices()[: len(shuffle) // size * size], rates)

    def wait(self):
        if self.thread is not None:
            self.thread.join()

    def close(self):
        self.wait()
        super().close()


STAGE = replace(gemm.STAGE, name=NAME, title="Later", engine=Later)
