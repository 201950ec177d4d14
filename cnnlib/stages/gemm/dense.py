"""Dense layers as products of matrices."""

import numpy as np

from cnnlib.engine.cpu import MicroBatchOperator, in_c_order, micro_batch_shape


class MatrixDense(MicroBatchOperator):
    """target (U, N) = weight (U, M) source (M, N) + bias."""

    def make_buffers(self) -> None:
        images = self.source.shape[-1]
        weight = self.parameters["weight"]
        self.target = self.buffer(*micro_batch_shape(self.planned.target_shape, images))
        self._error = self.target_error = np.empty_like(self.target)
        self._inputs = self.buffer(weight.shape[1], images)
        self._inputs_error = np.empty_like(self._inputs)
        self._products = np.empty_like(weight)

    def forward(self) -> None:
        source = in_c_order(self.source)
        np.copyto(self._inputs.reshape(source.shape), source)
        np.matmul(self.parameters["weight"], self._inputs, out=self.target)
        np.add(self.target, self.parameters["bias"][:, None], out=self.target)

    def backward(self) -> None:
        np.matmul(self._error, self._inputs.T, out=self._products)
        self.gradients["weight"] += self._products
        self.gradients["bias"] += self._error.sum(axis=1)
        if self.source_error is not None:
            np.matmul(self.parameters["weight"].T, self._error, out=self._inputs_error)
            source_error = in_c_order(self.source_error)
            np.copyto(source_error, self._inputs_error.reshape(source_error.shape))
