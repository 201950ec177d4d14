// Integer arithmetic that all kernels share: cnnlib/arithmetic.py in C++.
#pragma once
#include "portable.cuh"

// number / divisor, rounded up; neither is negative.
__host__ __device__ constexpr int ceil_div(int number, int divisor) { return (number + divisor - 1) / divisor; }
