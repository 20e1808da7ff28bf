// What the threads of a warp have, joined for all of them; every lane takes part.

#include "scalars.cuh"

struct Add {
    __device__ double operator()(double a, double b) const { return a + b; }
};
// The larger one; a NaN is passed over, so that sums must show it.
struct Most {
    __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

template <typename Join> __device__ inline double over_warp(double value, Join join) {
    for (int by = 16; by; by /= 2) value = join(value, __shfl_xor_sync(~0u, value, by));
    return value;
}
