// Everything that proof/sampling.py draws, bit for bit: the BLAKE3 XOF over a message, and what is made of its words.
//
// message (length) uint8, at most one chunk; key (8) uint32; out (count). A thread makes one 64-byte block of the stream:
// 16 words of 31 bits, 8 integers below `bound`, or 8 normals by Box and Muller from 4 pairs of words. `numbers` (34)
// float64: the coefficients of 2 atanh(s) / s (12), cos (10) and sin (10), highest first, ln 2 and pi / 2. Only IEEE
// operations, each rounded by itself, touch a number.

#include "blake3.cuh"

__device__ inline void stream_block(u32 (&words)[16], const u8* message, int length, const u32* key, u64 counter) {
    u32 cv[8], m[16];
#pragma unroll
    for (int i = 0; i < 8; i++) cv[i] = key[i];
    int done = 0;
    for (; done + BLOCK < length; done += BLOCK) {
        load_block(m, message + done, BLOCK, 1);
        compress(cv, m, 0, BLOCK, KEYED_HASH | (done ? 0 : CHUNK_START));
    }
    load_block(m, message + done, length - done, 1);
    u32 v[16];
    stirred(v, cv, m, counter, (u32)(length - done), KEYED_HASH | CHUNK_END | ROOT | (done ? 0 : CHUNK_START));
#pragma unroll
    for (int i = 0; i < 8; i++) words[i] = v[i] ^ v[i + 8], words[i + 8] = v[i + 8] ^ cv[i];
}

__device__ inline u64 long_word(const u32 (&words)[16], int i) { return (u64)words[2 * i + 1] << 32 | words[2 * i]; }

__device__ inline double horner(const double* coefficients, int count, double x) {
    double y = coefficients[0];
    for (int i = 1; i < count; i++) y = y * x + coefficients[i];
    return y;
}

// ln x = e ln 2 + 2 atanh((m - 1) / (m + 1)), x = m 2^e normal, m in [sqrt(1/2), sqrt 2)
__device__ inline double logarithm(double x, const double* numbers) {
    const i64 bits = __double_as_longlong(x);
    i64 e = (bits >> 52) - 1022;
    double m = __longlong_as_double((bits & 0xFFFFFFFFFFFFFll) | 1022ll << 52);
    if (m * m < 0.5) m = m + m, e--;
    const double s = (m - 1.0) / (m + 1.0);
    return (double)e * numbers[32] + s * horner(numbers, 12, s * s);
}

__device__ inline void normal_pair(u64 first, u64 second, const double* numbers, float* pair) {
    const double radius = sqrt(-2.0 * logarithm((double)((first >> 11) + 1) * 0x1p-53, numbers));
    const u64 turns = second >> 11, quarter = turns >> 51;
    const double x = ((double)(turns & (1ull << 51) - 1) * 0x1p-51 - 0.5) * numbers[33];
    const double cosine = horner(numbers + 12, 10, x * x), sine = x * horner(numbers + 22, 10, x * x);
    const double a = quarter & 1 ? -sine : cosine, b = quarter & 1 ? cosine : sine;
    pair[0] = (float)(radius * (quarter & 2 ? -a : a));
    pair[1] = (float)(radius * (quarter & 2 ? -b : b));
}

// floor(u n / 2^64)
__device__ inline u64 scaled(u64 u, u64 n) {
    const u64 middle = (u >> 32) * (n & 0xFFFFFFFFu) + ((u & 0xFFFFFFFFu) * (n & 0xFFFFFFFFu) >> 32);
    const u64 other = (u & 0xFFFFFFFFu) * (n >> 32) + (middle & 0xFFFFFFFFu);
    return (u >> 32) * (n >> 32) + (middle >> 32) + (other >> 32);
}

extern "C" __global__ void __launch_bounds__(128) draw_normals(const u8* message, const int length, const u32* key, const double* numbers, const i64 count, float* out) {
    const i64 block = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (8 * block >= count) return;
    u32 words[16];
    stream_block(words, message, length, key, (u64)block);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float pair[2];
        normal_pair(long_word(words, 2 * i), long_word(words, 2 * i + 1), numbers, pair);
        if (8 * block + 2 * i < count) out[8 * block + 2 * i] = pair[0];
        if (8 * block + 2 * i + 1 < count) out[8 * block + 2 * i + 1] = pair[1];
    }
}

extern "C" __global__ void __launch_bounds__(128) draw_words31(const u8* message, const int length, const u32* key, const i64 count, i64* out) {
    const i64 block = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (16 * block >= count) return;
    u32 words[16];
    stream_block(words, message, length, key, (u64)block);
#pragma unroll
    for (int i = 0; i < 16; i++)
        if (16 * block + i < count) out[16 * block + i] = (i64)(words[i] >> 1);
}

extern "C" __global__ void __launch_bounds__(128) draw_entries(const u8* message, const int length, const u32* key, const u64 bound, const i64 count, i64* out) {
    const i64 block = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (8 * block >= count) return;
    u32 words[16];
    stream_block(words, message, length, key, (u64)block);
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (8 * block + i < count) out[8 * block + i] = (i64)scaled(long_word(words, i), bound);
}
