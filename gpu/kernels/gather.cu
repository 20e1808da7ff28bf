// out[i] = the `width` bytes at addresses[i]; addresses (rows) int64, out (rows, width) uint8. A block of threads a row.

#include "scalars.cuh"

extern "C" __global__ void __launch_bounds__(128) gather_rows(const i64* addresses, const i64 width, u8* out) {
    const u8* from = (const u8*)addresses[blockIdx.x];
    u8* to = out + (i64)blockIdx.x * width;
    if (((i64)from | (i64)to | width) & 15) {
        for (i64 i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
    } else {
        for (i64 i = threadIdx.x; i < width / 16; i += blockDim.x) ((uint4*)to)[i] = ((const uint4*)from)[i];
    }
}
