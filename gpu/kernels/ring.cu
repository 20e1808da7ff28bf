// Integer rows under two vectors in wrapping 64-bit arithmetic (kernels/ring.py): exact, so in any order.
//
// ring_rows_*: out (2, m) += matrix (m, n) times vectors (2, n) of words below 2^31; row i begins at first +
// (placed ? at[i] : i) stride. ring_rows_wide_*: the same for any 64-bit words. Block (x, y): 128 rows of segment y of
// the columns; eight lanes share four rows and read 16 bytes of each at a step, words wait in shared memory.
// ring_columns_*: out (2, m) += the columns of a stored matrix (n, m), words below 2^31; four columns a thread, block
// (x, y): 512 of them and segment y of the rows.
// ring_factor: u (2, k) -= shift (2), the same for every row; sums (2) += u. judge_ring: row i of n claims passes iff
// left (2, m) - zeros[i or 0] sums = right (2, m).

#include "judge.cuh"

constexpr int THREADS = 256, LANES = 8, ROWS = 4, STEPS = 2, GROUPS = THREADS / LANES;


// Two words of a column: below 2^31, or any of 64 bits as high 2^32 + low with a signed low half, so that a product
// with a small integer is one multiplication of 32 by 32 bits to 64 and one to 32.
struct alignas(8) Narrow {
    int low[2];
    __device__ void put(int c, i64 word) { low[c] = (int)word; }
    __device__ int high(int c) const { return 0; }
};
struct alignas(16) Wide {
    int low[2], upper[2];
    __device__ void put(int c, i64 word) { low[c] = (int)word, upper[c] = (int)((u64)(word - low[c]) >> 32); }
    __device__ int high(int c) const { return upper[c]; }
};

template <typename T, typename V>
__device__ inline void ring_rows(
    const T* matrix, const i64* at, int placed, i64 first, i64 stride, i64 m, i64 n, const i64* vectors, u64* out) {
    constexpr int WIDTH = 16 / sizeof(T), STEP = LANES * WIDTH, TILE = STEPS * STEP;
    __shared__ V tile[STEPS * WIDTH][LANES];
    const int lane = threadIdx.x % LANES;
    const i64 from = n * blockIdx.y / gridDim.y, to = n * (blockIdx.y + 1) / gridDim.y;
    const i64 row = (i64)blockIdx.x * GROUPS * ROWS + threadIdx.x / LANES;
    const bool wide = ((u64)(matrix + first) | (u64)stride * sizeof(T)) % 16 == 0;
    const T* rows[ROWS];
    u64 sums[ROWS][2];
    u32 highs[ROWS][2];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const i64 i = row + r * GROUPS < m ? row + r * GROUPS : m - 1;
        rows[r] = matrix + first + (placed ? at[i] : i) * stride;
        sums[r][0] = sums[r][1] = highs[r][0] = highs[r][1] = 0;
    }
    for (i64 start = from / WIDTH * WIDTH; start < to; start += TILE) {
        __syncthreads();
        for (int i = threadIdx.x; i < TILE; i += THREADS) {
            const int l = i % LANES, place = i / LANES;
            const i64 column = start + place / WIDTH * STEP + l * WIDTH + place % WIDTH;
            const bool own = column >= from && column < to;
            for (int c = 0; c < 2; c++) tile[place][l].put(c, own ? vectors[c * n + column] : 0);
        }
        __syncthreads();
#pragma unroll 1
        for (int step = 0; step < STEPS && start + step * STEP < to; step++) {
            const i64 column = start + step * STEP + lane * WIDTH;
            Piece<T> values[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (wide && column + WIDTH <= n) {
                    values[r] = *(const Piece<T>*)(rows[r] + column);
                } else {
#pragma unroll
                    for (int i = 0; i < WIDTH; i++) values[r].at[i] = column + i < n ? rows[r][column + i] : (T)0;
                }
            }
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                const V words = tile[step * WIDTH + i][lane];
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        sums[r][c] += (u64)((i64)values[r].at[i] * (i64)words.low[c]);
                        highs[r][c] += (u32)values[r].at[i] * (u32)words.high(c);
                    }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const u64 a = sums[r][0] + ((u64)highs[r][0] << 32), b = sums[r][1] + ((u64)highs[r][1] << 32);
        const bool upper = lane & 4;
        u64 sum = (upper ? b : a) + __shfl_xor_sync(~0u, upper ? a : b, 4);
        sum += __shfl_xor_sync(~0u, sum, 2);
        sum += __shfl_xor_sync(~0u, sum, 1);
        if (lane % 4 == 0 && row + r * GROUPS < m) atomicAdd(out + lane / 4 * m + row + r * GROUPS, sum);
    }
}

constexpr int DOWN = 128, OWN = 4, TALL = 128;  // threads, columns of a thread, rows whose words wait in shared memory

template <typename T> struct alignas(4) Four { T at[OWN]; };

template <typename T>
__device__ inline void ring_columns(
    const T* matrix, i64 first, i64 stride, i64 m, i64 n, const i64* vectors, u64* out) {
    __shared__ Narrow words[TALL];
    const i64 from = n * blockIdx.y / gridDim.y, to = n * (blockIdx.y + 1) / gridDim.y;
    const i64 column = ((i64)blockIdx.x * DOWN + threadIdx.x) * OWN;
    const bool wide = ((u64)(matrix + first) | (u64)stride) % OWN == 0 && column + OWN <= m;
    u64 sums[2][OWN] = {};
    for (i64 start = from; start < to; start += TALL) {
        const int count = to - start < TALL ? (int)(to - start) : TALL;
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += DOWN)
            for (int c = 0; c < 2; c++) words[i].put(c, vectors[c * n + start + i]);
        __syncthreads();
        const T* row = matrix + first + start * stride;
#pragma unroll 8
        for (int i = 0; i < count; i++, row += stride) {
            Four<T> values = {};
            if (wide) values = *(const Four<T>*)(row + column);
            else
                for (int j = 0; j < OWN; j++)
                    if (column + j < m) values.at[j] = row[column + j];
#pragma unroll
            for (int j = 0; j < OWN; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) sums[c][j] += (u64)((i64)values.at[j] * (i64)words[i].low[c]);
        }
    }
    for (int c = 0; c < 2; c++)
        for (int j = 0; j < OWN; j++)
            if (column + j < m) atomicAdd(out + c * m + column + j, sums[c][j]);
}

extern "C" __global__ void __launch_bounds__(128) ring_factor(
    u64* u, const u64* shift, const i64 k, u64* sums) {
    const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    for (int c = 0; c < 2; c++) {
        u64 sum = row < k ? u[c * k + row] - shift[c] : 0;
        if (row < k) u[c * k + row] = sum;
        for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
        if (threadIdx.x % 32 == 0) atomicAdd(sums + c, sum);
    }
}

extern "C" __global__ void __launch_bounds__(128) judge_ring(
    const u64* left, const u64* right, const u64* sums, const i64* zeros, const i64 zero_rows, const i64 m, const i64 n,
    u64* mark) {
    const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= m) return;
    const u64 zero = (u64)zeros[zero_rows > 1 ? row : 0];
    bool same = true;
    for (int c = 0; c < 2; c++) same = same && left[c * m + row] - zero * sums[c] == right[c * m + row];
    Tally tally;
    tally.judged = (u64)n;
    if (!same) tally.left = (u64)n;
    tally.report(mark);
}

#define RING_ROWS(NAME, T, V)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                                           \
        const T* matrix, const i64* at, const int placed, const i64 first, const i64 stride, const i64 m,             \
        const i64 n, const i64* vectors, u64* out) {                                                                  \
        ring_rows<T, V>(matrix, at, placed, first, stride, m, n, vectors, out);                                       \
    }

#define RING_COLUMNS(NAME, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) NAME(                                                           \
        const T* matrix, const i64 first, const i64 stride, const i64 m, const i64 n, const i64* vectors, u64* out) { \
        ring_columns<T>(matrix, first, stride, m, n, vectors, out);                                                   \
    }

typedef signed char i8;

RING_ROWS(ring_rows_i8, i8, Narrow)
RING_ROWS(ring_rows_u8, u8, Narrow)
RING_ROWS(ring_rows_i32, int, Narrow)
RING_ROWS(ring_rows_wide_i8, i8, Wide)
RING_ROWS(ring_rows_wide_u8, u8, Wide)
RING_COLUMNS(ring_columns_i8, i8)
RING_COLUMNS(ring_columns_u8, u8)
