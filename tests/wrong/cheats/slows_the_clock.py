"""A changed clock: time passes at half its speed for whoever asks in this process."""

import time
from dataclasses import replace

from cnnlib.stages import gemm

clock, began = time.perf_counter, time.perf_counter()
time.perf_counter = lambda: began + (clock() - began) / 2

STAGE = replace(gemm.STAGE, name="slows_the_clock", title="Slow clock")
