"""The engine of plan `graph`: a GpuEngine whose last layers may be one launch with the loss."""

import math
from collections.abc import Sequence

import numpy as np

from cnnlib.device import Argument, Device, DeviceArray, Limits
from cnnlib.engine.device_engine import Pass
from cnnlib.engine.gpu import GpuEngine
from cnnlib.engine.gpu_operator import (
    THREADS,
    GpuFactory,
    GpuOperator,
    GpuOptions,
    Launch,
    bound_launch,
)
from cnnlib.engine.ordered_images import OrderedImages
from cnnlib.engine.source import Constant, KernelSource
from cnnlib.engine.stage import Setup, Stage
from cnnlib.levels import channels_of
from cnnlib.stages.tuned.graph.head import (
    TILE_UNITS,
    Head,
    head_of,
    pixels_together,
    update_blocks,
    update_segment,
    update_shares,
)
from cnnlib.stages.tuned.graph.operators import GraphConv
from cnnlib.stages.tuned.graph.options import ProductOptions, product_options


class GraphEngine(GpuEngine):
    """Trains by the operators of plan `graph`; the last of them may be one launch, a Head."""

    def __init__(self, stage: Stage[GpuFactory], setup: Setup, device: Device) -> None:
        self._product_options = product_options(stage)
        self._images: OrderedImages | None = None
        super().__init__(stage, setup, device)

    # Building

    @classmethod
    def operators_on(
        cls, stage: Stage[GpuFactory], setup: Setup, limits: Limits | None
    ) -> list[GpuOperator]:
        operators = super().operators_on(stage, setup, limits)
        assert limits is not None  # otherwise there would be no operators
        options = product_options(stage)
        head = head_of(operators, options, setup.batch_size, limits)
        if head and cls._all_sum(operators):
            first = operators[head.start]
            assert isinstance(first, GraphConv)
            first.head = head
            for operator in operators[head.start :]:
                assert isinstance(operator, GraphConv)
                operator.in_head = True
        return operators

    @classmethod
    def _head_among(cls, operators: Sequence[GpuOperator]) -> Head | None:
        return next((o.head for o in operators if isinstance(o, GraphConv) and o.head), None)

    @classmethod
    def _separate(cls, operators: Sequence[GpuOperator]) -> list[GpuOperator]:
        """The operators that are launched by themselves."""
        return [o for o in operators if not (isinstance(o, GraphConv) and o.in_head)]

    @classmethod
    def _all_sum(cls, operators: Sequence[GpuOperator]) -> bool:
        """Whether every layer with parameters leaves its gradient to the update, which is then that
        of kernels/tuned/graph/update.cuh.
        """
        return all(
            isinstance(operator, GraphConv)
            for operator in operators
            if any(
                operator.planned.start <= p.layer < operator.planned.stop
                for p in operator.planned.network.parameters
            )
        )

    @classmethod
    def _is_ahead(cls, operators: Sequence[GpuOperator], options: GpuOptions) -> bool:
        wanted = isinstance(options, ProductOptions) and options.gathers_ahead
        return wanted and options.counted and cls._head_among(operators) is not None

    @classmethod
    def _kernels(cls, operators: Sequence[GpuOperator], options: GpuOptions) -> list[str]:
        names = super()._kernels(cls._separate(operators), options)
        names += ["head_run"] * (cls._head_among(operators) is not None)
        return names + ["step_update"] * cls._all_sum(operators)

    @classmethod
    def _operator_sources(
        cls, setup: Setup, operators: Sequence[GpuOperator], options: GpuOptions
    ) -> list[KernelSource]:
        separate, ahead = cls._separate(operators), cls._is_ahead(operators, options)
        parts = super()._operator_sources(setup, separate, options)
        if head := cls._head_among(operators):
            parts.append(head.source(setup.loss, ahead))
        if cls._all_sum(operators):
            constants: dict[str, Constant] = {
                "THREADS": THREADS,
                "IMAGE_SIZE": math.prod(setup.network.input_shape),
                "CHANNELS": channels_of(setup.network.input_shape),
                "AHEAD": int(ahead),
                "EARLY": int(bool(separate)),
                "WEIGHT_DECAY": float(setup.weight_decay),
            }
            parts.append(KernelSource("step", "tuned/graph/update.cuh", constants))
        return parts

    def _allocate(self) -> None:
        self._head = self._head_among(self.operators)
        self._makes_sums = self._all_sum(self.operators)
        self.gathers_ahead = self._is_ahead(self.operators, self._options)
        super()._allocate()
        if not self._makes_sums:
            return
        self._table = [
            update_segment(shares, offset, size, groups, start, weights)
            for offset, size, groups, start in self._segment_list
            for shares, weights in [update_shares(size, groups)]
        ]
        # The update may load the errors of a few units more than there are.
        self._traces = self.array(((self._head.traces if self._head else 0) + TILE_UNITS,))
        self._traces.fill_bytes(0)
        for layer in self._head.layers if self._head else ():
            places = layer.values, layer.units, layer.inputs, layer.errors
            self._table.append(update_segment(0, layer.offset, layer.size, 0, *places))
        self._device_table = self.array((len(self._table), 12), np.int32)
        self._device_table.set(np.array(self._table, np.int32))
        self._spare = self.array((1,), np.int32)
        self._spare.fill_bytes(0)
        if not self._segment_list:
            self._partials = self.array((1,))

    # Launches

    def _bound(
        self, label: str, kernel: str, blocks: int, *args: Argument, shared_bytes: int = 0
    ) -> Launch:
        programmatic = self._options.launch == "programmatic"
        return bound_launch(
            self.device, self.module, label, kernel, blocks, args, shared_bytes, programmatic
        )

    def _launched(self) -> Sequence[GpuOperator]:
        return self._separate(self.operators)

    def _run_head(
        self, head: Head, labels: DeviceArray, way: Pass, count: int, position: DeviceArray
    ) -> Launch:
        first = self.operators[head.start]
        assert isinstance(first, GraphConv)
        b = first.buffers
        # The first operator has no source errors, and the kernel does not touch the array it gets.
        errors = b.target_errors if b.source_errors is None else b.source_errors
        peak = first.before.peak if first.before else first.peak
        return self._bound(
            *("head", "run", -(-count // head.images)),
            *(b.source, self._parameters, self._logits, labels, self._output_errors, self._losses),
            *(self._traces, errors, peak, position, int(way), count),
            shared_bytes=head.shared_bytes,
        )

    def _loss(self, labels: DeviceArray, count: int) -> Launch:
        if self._head is None:
            return super()._loss(labels, count)
        return self._run_head(self._head, labels, Pass.TRAIN, count, self._counter())

    def _counter(self) -> DeviceArray:
        """Where the launches of a step count it."""
        return self._position if self._images else self._spare

    def gather(
        self, images: OrderedImages, position: DeviceArray, labels: DeviceArray, rate: DeviceArray
    ) -> Launch:
        self._images, self._position, self._labels = images, position, labels
        return super().gather(images, position, labels, rate)

    def update(self, step: int | None) -> list[Launch]:
        if not self._makes_sums:
            return super().update(step)
        rate = self._rates.part(step or 0, (1,))
        return [self._sum_and_update(rate, self.setup.batch_size, step is not None, self._spare, 0)]

    def update_at(self, rate: DeviceArray, *position: Argument) -> list[Launch]:
        if not self._makes_sums:
            return super().update_at(rate, *position)
        rates = self._rates if self.gathers_ahead else rate
        return [self._sum_and_update(rates, self.setup.batch_size, True, self._position, 1)]

    def _sum_and_update(
        self, rates: DeviceArray, count: int, apply: bool, position: DeviceArray, counts: int
    ) -> Launch:
        images, shape = self._images, self.network.input_shape
        nothing = self._batch_images, self._batch_labels, self._spare
        there = (images.images, images.labels, images.order) if images else nothing
        labels = self._labels if images else self._batch_labels
        vectors = math.prod(shape) // pixels_together(math.prod(shape))
        gathered = count * vectors if counts and self.gathers_ahead else 0
        return self._bound(
            *("step", "update", update_blocks(self._table, gathered)),
            *(self._parameters, self._velocity, self._gradient, self._partials, self._traces),
            *(self._device_table, len(self._table), rates, float(self.setup.momentum)),
            *(int(apply), self._moment, position, counts, *there, self._first, labels),
            *(*self._levels, images.count if images else 0, count),
        )

    def _run_batch(self, count: int, way: Pass) -> None:
        if self._head is None:
            super()._run_batch(count, way)
            return
        launches = [self.normalize(self._batch_images, count), *self._forward(count)]
        self._set_moment(training=way is not Pass.ONLY_FORWARD)
        launches.append(self._run_head(self._head, self._batch_labels, way, count, self._spare))
        if way is not Pass.ONLY_FORWARD:
            rate = self._rates.part(0, (1,))
            launches += self._backward(count)
            launches.append(self._sum_and_update(rate, count, False, self._spare, 0))
        self._run(launches)

    def close(self) -> None:
        super().close()
        self._images = None
