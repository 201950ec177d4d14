// Integer arithmetic that all kernels share: cnnlib/arithmetic.py in C++.
#pragma once
#include "portable.cuh"

// number / divisor, rounded up; neither is negative.
__host__ __device__ constexpr int ceil_div(int number, int divisor) { return (number + divisor - 1) / divisor; }

__host__ __device__ constexpr int smaller_of(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int larger_of(int a, int b) { return a > b ? a : b; }
