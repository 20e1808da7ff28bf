// What T1 asks of a matrix (kernels/fold.py): for rows v (n), eight vectors r and scales a, the sums v r, the energy
// sum (v a)^2, the rounding sum (2^exponent(v) a)^2, and the probe: the largest mean square of the sums so far.
//
// fold_blocks_*, and fold_claims_* with rounding: row i begins at first + (placed ? at[i] : i) stride of `matrix`;
// vectors (n, 8) and scales (n), float32, but float64 for fold_blocks_wide_f32. Block (x, y): 128 rows (64 of float32
// or float64) of segment y of the columns, from y n / segments. Eight lanes share four rows (two) and read 16 bytes of
// each at a step, if aligned; the vectors wait in shared memory.
// fold_columns_*: the same of the columns of a stored matrix (n, m), for products with a transposed factor; two columns
// a lane, the rows of a segment dealt to four warps.
// Both write sums (segments, m, 8) and marks (segments, m, 2): energy, rounding. float64.
// fold_rows: sums (m, 8) and marks (m, 3): energy, probe after every `every` segments, rounding; eight lanes a row.
// fold_factor_*: vectors (m, 8) and scales (m), the root of the energy, for the next fold.
// square_rows_*, square_columns_*: sums of squares (segments, n), of rows or columns, float64; column_weights makes of
// them the exponents of freivalds.column_weights, weighted_vectors vectors r d. judge_rows_*: freivalds.judge_rows.
//
// float32 matrices: float64 throughout. 16-bit ones: sums of SHORT products in float32, eight of those in a tree, then
// float64. Such a sum errs by at most ERROR of the size of its terms; errors of different sums have different signs, as
// vectors are normal and unknown to who claims, so a residual errs by less than quantile * ERROR * size on each side.
// Values that float32 cannot hold give NaN, infinity or an energy out of range, and the row is left. Column weights and
// vectors are bit-exact; a subnormal bfloat16 counts as no rounding, which only narrows what is cleared.

#include "judge.cuh"

constexpr int THREADS = 256, LANES = 8, STEPS = 4, GROUPS = THREADS / LANES;
constexpr int SHORT = 32;
constexpr double ERROR = 0x1p-24 * (SHORT + 16), EVALUATION = 0x1p-50, SMALLEST = 0x1p-100, LARGEST = 0x1p100;

struct alignas(16) Floats { float at[4]; };
struct alignas(16) Doubles { double at[2]; };

// A: in what products of T are summed; Piece: 16 bytes of A; Pair: as many bytes as two T.
template <typename T> struct Kind { typedef float A; typedef Floats Piece; typedef u32 Pair; };
template <> struct Kind<float> { typedef double A; typedef Doubles Piece; typedef u64 Pair; };
template <> struct Kind<double> { typedef double A; typedef Doubles Piece; };

template <typename T> __device__ inline T element(const u32 (&words)[4], int i);
__device__ inline u16 sixteen(const u32 (&words)[4], int i) { return (u16)(words[i / 2] >> 16 * (i & 1)); }
template <> __device__ inline bf16 element(const u32 (&words)[4], int i) { return {sixteen(words, i)}; }
template <> __device__ inline f16 element(const u32 (&words)[4], int i) { return {sixteen(words, i)}; }
template <> __device__ inline float element(const u32 (&words)[4], int i) { return as_float(words[i]); }
template <> __device__ inline double element(const u32 (&words)[4], int i) {
    return __longlong_as_double((i64)((u64)words[2 * i + 1] << 32 | words[2 * i]));
}

__device__ inline void put(u32 (&words)[4], int i, const u16* at) { words[i / 2] |= (u32)*at << 16 * (i & 1); }
__device__ inline void put(u32 (&words)[4], int i, const u32* at) { words[i] = *at; }
__device__ inline void put(u32 (&words)[4], int i, const u64* at) {
    words[2 * i] = (u32)*at, words[2 * i + 1] = (u32)(*at >> 32);
}
template <int BYTES> struct Word { typedef u16 type; };
template <> struct Word<4> { typedef u32 type; };
template <> struct Word<8> { typedef u64 type; };

// words = 16 bytes of a row from `column`, zeros from column n on.
template <typename T> __device__ inline void load(u32 (&words)[4], const T* row, i64 column, i64 n, bool wide) {
    constexpr int WIDTH = 16 / sizeof(T);
    if (wide && column + WIDTH <= n) {
        const uint4 all = *(const uint4*)(row + column);
        words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
        return;
    }
    words[0] = words[1] = words[2] = words[3] = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
        if (column + i < n) put(words, i, (const typename Word<sizeof(T)>::type*)(row + column + i));
}

// 2^exponent of a value; 0 for a subnormal bfloat16.
__device__ inline float binade(bf16 x) { return as_float((u32)x.bits << 16 & 0x7f800000u); }
__device__ inline float binade(f16 x) { return fmaxf(as_float(__float_as_uint(widen(x)) & 0x7f800000u), 0x1p-14f); }
__device__ inline double binade(float x) { return fmaxf(as_float(__float_as_uint(x) & 0x7f800000u), 0x1p-126f); }
__device__ inline double binade(double x) { return __longlong_as_double(__double_as_longlong(x) & 2047ll << 52); }

__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Lane c of eight: the sum of v[c] over the eight.
template <typename A> __device__ inline A gathered(A (&v)[8]) {
#pragma unroll
    for (int half = 4; half; half /= 2) {
        const bool upper = threadIdx.x & half;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const A given = upper ? v[i] : v[i + half], kept = upper ? v[i + half] : v[i];
            v[i] = kept + __shfl_xor_sync(~0u, given, half);
        }
    }
    return v[0];
}

// Lanes 0 to 3 of eight: the sum of `low` over the eight; 4 to 7: of `high`.
template <typename A> __device__ inline A gathered(A low, A high) {
    const bool upper = threadIdx.x & 4;
    A sum = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, 4);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return sum + __shfl_xor_sync(~0u, sum, 1);
}

template <typename T, typename V, bool CLAIMS>
__device__ inline void fold_blocks(
    const T* matrix, const i64* at, int placed, i64 first, i64 stride, i64 m, i64 n, const V* vectors, const V* scales,
    double* sums, double* marks) {
    typedef typename Kind<T>::A A;
    typedef typename Kind<T>::Piece Piece;
    constexpr int WIDTH = 16 / sizeof(T), STEP = LANES * WIDTH, TILE = STEPS * STEP;
    constexpr int SIZE = 16 / sizeof(A), PIECES = 8 / SIZE;
    constexpr bool NARROW = sizeof(A) == 4;
    constexpr int ROWS = NARROW ? 4 : 2;
    static_assert(!NARROW || STEPS * WIDTH == SHORT, "terms of a sum in float32");
    __shared__ Piece tile[STEPS * WIDTH][PIECES][LANES];
    __shared__ A weights[STEPS * WIDTH][LANES];
    const int lane = threadIdx.x % LANES;
    const i64 from = n * blockIdx.y / gridDim.y, to = n * (blockIdx.y + 1) / gridDim.y;
    const i64 row = (i64)blockIdx.x * GROUPS * ROWS + threadIdx.x / LANES;
    const bool wide = ((u64)(matrix + first) | (u64)stride * sizeof(T)) % 16 == 0;
    const T* rows[ROWS];
    A acc[ROWS][8], energy[ROWS], rounding[ROWS];
    double total[ROWS], mark[ROWS];
    u32 touched[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const i64 i = row + r * GROUPS < m ? row + r * GROUPS : m - 1;
        rows[r] = matrix + first + (placed ? at[i] : i) * stride;
#pragma unroll
        for (int c = 0; c < 8; c++) acc[r][c] = 0;
        energy[r] = rounding[r] = 0, total[r] = mark[r] = 0.0, touched[r] = 0;
    }

    for (i64 start = from / WIDTH * WIDTH; start < to; start += TILE) {
        __syncthreads();
        for (int i = threadIdx.x; i < TILE * 8; i += THREADS) {
            const int c = i % 8, l = i / 8 % LANES, place = i / (8 * LANES);
            const i64 column = start + place / WIDTH * STEP + l * WIDTH + place % WIDTH;
            const bool own = column >= from && column < to;
            tile[place][c / SIZE][l].at[c % SIZE] = own ? (A)vectors[column * 8 + c] : (A)0;
            if (!c) weights[place][l] = own ? (A)scales[column] : (A)0;
        }
        __syncthreads();
#pragma unroll 1
        for (int step = 0; step < STEPS && start + step * STEP < to; step++) {
            u32 words[ROWS][4];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                load(words[r], rows[r], start + step * STEP + lane * WIDTH, n, wide);
                if (NARROW) touched[r] |= words[r][0] | words[r][1] | words[r][2] | words[r][3];
            }
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                const int place = step * WIDTH + i;
                const A weight = weights[place][lane];
                A vector[8];
#pragma unroll
                for (int p = 0; p < PIECES; p++) {
                    const Piece piece = tile[place][p][lane];
#pragma unroll
                    for (int j = 0; j < SIZE; j++) vector[p * SIZE + j] = piece.at[j];
                }
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const T value = element<T>(words[r], i);
                    const A v = (A)widen(value), scaled = v * weight;
#pragma unroll
                    for (int c = 0; c < 8; c++) acc[r][c] = multiply_add(v, vector[c], acc[r][c]);
                    energy[r] = multiply_add(scaled, scaled, energy[r]);
                    if (CLAIMS) {
                        const A size = (A)binade(value) * weight;
                        rounding[r] = multiply_add(size, size, rounding[r]);
                    }
                }
            }
        }
        if (NARROW || start + TILE >= to) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (r * GROUPS >= m - (i64)blockIdx.x * GROUPS * ROWS) continue;
                total[r] += (double)gathered(acc[r]);
                mark[r] += (double)gathered(energy[r], rounding[r]);
#pragma unroll
                for (int c = 0; c < 8; c++) acc[r][c] = 0;
                energy[r] = rounding[r] = 0;
            }
        }
    }

#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r * GROUPS >= m - (i64)blockIdx.x * GROUPS * ROWS) continue;
        const bool any = __ballot_sync(~0u, (touched[r] & 0x7fff7fffu) != 0) >> threadIdx.x % 32 / LANES * LANES & 255u;
        if (any && mark[r] == 0.0 && lane == 0) mark[r] = 0x1p-1000;  // squares below float32: not a row of zeros
        const i64 place = blockIdx.y * m + row + r * GROUPS;
        if (row + r * GROUPS >= m) continue;
        sums[place * 8 + lane] = total[r];
        if (lane % 4 == 0) marks[place * 2 + lane / 4] = mark[r];
    }
}

template <typename T> struct Two { T low, high; };
__device__ inline Two<bf16> split(u32 pair, bf16) { return {{(u16)pair}, {(u16)(pair >> 16)}}; }
__device__ inline Two<f16> split(u32 pair, f16) { return {{(u16)pair}, {(u16)(pair >> 16)}}; }
__device__ inline Two<float> split(u64 pair, float) { return {as_float((u32)pair), as_float((u32)(pair >> 32))}; }

// Elements `column` and the next of a row of m, zeros from m on.
template <typename T> __device__ inline Two<T> two(const T* row, i64 column, i64 m, bool wide) {
    typedef typename Kind<T>::Pair Pair;
    typedef typename Word<sizeof(T)>::type Half;
    if (wide && column + 1 < m) return split(*(const Pair*)(row + column), T());
    const Pair low = column < m ? *(const Half*)(row + column) : 0;
    const Pair high = column + 1 < m ? *(const Half*)(row + column + 1) : 0;
    return split((Pair)(high << 8 * sizeof(T) | low), T());
}

constexpr int WARPS = 4, COLUMNS = 64;  // of a block that goes down columns

template <typename T>
__device__ inline void fold_columns(
    const T* matrix, i64 first, i64 stride, i64 m, i64 n, const float* vectors, const float* scales, double* sums,
    double* marks) {
    typedef typename Kind<T>::A A;
    typedef typename Kind<T>::Piece Piece;
    constexpr int SIZE = 16 / sizeof(A), PIECES = 8 / SIZE;
    constexpr bool NARROW = sizeof(A) == 4;
    __shared__ Piece tile[WARPS * SHORT][PIECES];
    __shared__ A weights[WARPS * SHORT];
    __shared__ double room[WARPS][COLUMNS][9];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 from = n * blockIdx.y / gridDim.y, to = n * (blockIdx.y + 1) / gridDim.y;
    const i64 column = (i64)blockIdx.x * COLUMNS + 2 * lane;
    const bool wide = ((u64)(matrix + first) | (u64)stride * sizeof(T)) % (2 * sizeof(T)) == 0;
    A acc[2][9];
    double total[2][9];
#pragma unroll
    for (int i = 0; i < 18; i++) acc[i / 9][i % 9] = 0, total[i / 9][i % 9] = 0.0;

    for (i64 start = from; start < to; start += WARPS * SHORT) {
        __syncthreads();
        for (int i = threadIdx.x; i < WARPS * SHORT * 8; i += 32 * WARPS) {
            const i64 row = start + i / 8;
            tile[i / 8][i % 8 / SIZE].at[i % SIZE] = row < to ? (A)vectors[row * 8 + i % 8] : (A)0;
            if (i % 8 == 0) weights[i / 8] = row < to ? (A)scales[row] : (A)0;
        }
        __syncthreads();
        const i64 begin = start + warp * SHORT;
        const int count = to - begin < SHORT ? (int)(to - begin) : SHORT;
        const T* row = matrix + first + begin * stride;
#pragma unroll 8
        for (int i = 0; i < count; i++, row += stride) {
            const Two<T> values = two(row, column, m, wide);
            const A v[2] = {(A)widen(values.low), (A)widen(values.high)}, weight = weights[warp * SHORT + i];
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const Piece piece = tile[warp * SHORT + i][p];
#pragma unroll
                for (int j = 0; j < 2 * SIZE; j++) {
                    A& sum = acc[j / SIZE][p * SIZE + j % SIZE];
                    sum = multiply_add(v[j / SIZE], piece.at[j % SIZE], sum);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const A scaled = v[j] * weight;
                acc[j][8] = multiply_add(scaled, scaled, acc[j][8]);
            }
        }
#pragma unroll
        for (int i = 0; i < 18 && NARROW; i++) {
            total[i / 9][i % 9] += (double)acc[i / 9][i % 9];
            acc[i / 9][i % 9] = 0;
        }
    }
#pragma unroll
    for (int i = 0; i < 18; i++)
        room[warp][2 * lane + i / 9][i % 9] = NARROW ? total[i / 9][i % 9] : (double)acc[i / 9][i % 9];
    __syncthreads();
    for (int i = threadIdx.x; i < COLUMNS * 9; i += 32 * WARPS) {
        const i64 own = (i64)blockIdx.x * COLUMNS + i / 9, place = blockIdx.y * m + own;
        double sum = 0.0;
        for (int w = 0; w < WARPS; w++) sum += room[w][i / 9][i % 9];
        if (own >= m) continue;
        if (i % 9 < 8) sums[place * 8 + i % 9] = sum;
        else marks[place * 2] = sum, marks[place * 2 + 1] = 0.0;
    }
}

extern "C" __global__ void __launch_bounds__(128) fold_rows(
    const double* sums, const double* marks, const int segments, const int every, const i64 m, double* folded,
    double* found) {
    const int lane = threadIdx.x % LANES;
    const i64 own = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / LANES, row = own < m ? own : m - 1;
    double sum = 0.0, mark = 0.0, probe = 0.0;
    for (int segment = 0; segment < segments; segment++) {
        const i64 place = segment * m + row;
        sum += sums[place * 8 + lane];
        if (lane < 2) mark += marks[place * 2 + lane];
        if ((segment + 1) % every) continue;
        double square = sum * sum;
        for (int half = 4; half; half /= 2) square += __shfl_xor_sync(~0u, square, half);
        probe = fmax(probe, square / 8.0);
    }
    if (own >= m) return;
    folded[row * 8 + lane] = sum;
    if (lane < 2) found[row * 3 + 2 * lane] = mark;
    if (lane == 2) found[row * 3 + 1] = probe;
}

template <typename V>
__device__ inline void fold_factor(
    const double* sums, const double* marks, int segments, i64 m, V* vectors, V* scales) {
    const int lane = threadIdx.x % LANES;
    const i64 row = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (row >= m) return;
    double sum = 0.0, energy = 0.0;
    for (int segment = 0; segment < segments; segment++) {
        sum += sums[(segment * m + row) * 8 + lane];
        if (!lane) energy += marks[(segment * m + row) * 2];
    }
    vectors[row * 8 + lane] = (V)sum;
    if (!lane) scales[row] = (V)sqrt(energy);
}

template <typename T>
__device__ inline void square_rows(const T* matrix, i64 first, i64 stride, i64 rows, i64 n, double* squares) {
    constexpr int WIDTH = 16 / sizeof(T);
    const i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32, own = row < rows ? row : rows - 1;
    const i64 from = n * blockIdx.y / gridDim.y, to = n * (blockIdx.y + 1) / gridDim.y;
    const bool wide = ((u64)(matrix + first) | (u64)stride * sizeof(T)) % 16 == 0;
    double sum = 0.0;
#pragma unroll 4
    for (i64 start = from / WIDTH * WIDTH + threadIdx.x % 32 * WIDTH; start < to; start += 32 * WIDTH) {
        u32 words[4];
        load(words, matrix + first + own * stride, start, n, wide);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const double v = (double)widen(element<T>(words, i));
            if (start + i >= from && start + i < to) sum = fma(v, v, sum);
        }
    }
    for (int half = 16; half; half /= 2) sum += __shfl_xor_sync(~0u, sum, half);
    if (row < rows && threadIdx.x % 32 == 0) squares[blockIdx.y * rows + row] = sum;
}

template <typename T>
__device__ inline void square_columns(const T* matrix, i64 first, i64 stride, i64 n, i64 rows, double* squares) {
    __shared__ double room[WARPS][COLUMNS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 from = rows * blockIdx.y / gridDim.y, to = rows * (blockIdx.y + 1) / gridDim.y;
    const i64 column = (i64)blockIdx.x * COLUMNS + 2 * lane;
    const bool wide = ((u64)(matrix + first) | (u64)stride * sizeof(T)) % (2 * sizeof(T)) == 0;
    double low = 0.0, high = 0.0;
#pragma unroll 8
    for (i64 row = from + warp; row < to; row += WARPS) {
        const Two<T> values = two(matrix + first + row * stride, column, n, wide);
        const double a = (double)widen(values.low), b = (double)widen(values.high);
        low = fma(a, a, low), high = fma(b, b, high);
    }
    room[warp][2 * lane] = low, room[warp][2 * lane + 1] = high;
    __syncthreads();
    const i64 own = (i64)blockIdx.x * COLUMNS + threadIdx.x;
    if (threadIdx.x >= COLUMNS || own >= n) return;
    double sum = 0.0;
    for (int w = 0; w < WARPS; w++) sum += room[w][threadIdx.x];
    squares[blockIdx.y * n + own] = sum;
}

// Exponents (n): q with d = 2^-q, or NONE where a column is zero; `largest` the greatest FARTHEST + 1 - q, at first 0.
// A mean square so near an odd power of two that the reference may round it the other way, or a d that float32 cannot
// work with, leaves the product.
constexpr int NONE = 1 << 20, FARTHEST = 60;

extern "C" __global__ void __launch_bounds__(128) column_weights(
    const double* squares, const int segments, const i64 rows, const i64 n, int* exponents, int* largest, u64* mark) {
    const i64 column = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= n) return;
    double energy = 0.0;
    for (int segment = 0; segment < segments; segment++) energy += squares[segment * n + column];
    energy /= (double)rows;
    exponents[column] = NONE;
    if (!(energy > 0.0) || !is_finite(energy)) return;
    const i64 bits = __double_as_longlong(energy);
    const int exponent = (int)(bits >> 52) - 1023, q = exponent + 1 >> 1;
    const double significand = __longlong_as_double((bits & 0xFFFFFFFFFFFFFll) | 1023ll << 52);
    const double doubt = (double)(rows + 64) * 0x1p-50;
    const bool open = exponent & 1 ? significand - 1.0 < doubt : 2.0 - significand < doubt;
    if (open || q > FARTHEST || q < -FARTHEST) {
        atomicAdd(mark + 2, (u64)1);
        return;
    }
    exponents[column] = q;
    atomicMax(largest, FARTHEST + 1 - q);
}

// vectors (n, 8) = normals (8, n) times d; scales (n) = d; norm += sum d^2.
extern "C" __global__ void __launch_bounds__(128) weighted_vectors(
    const float* normals, const int* exponents, const int* largest, const i64 n, float* vectors, float* scales,
    double* norm) {
    const i64 column = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    double square = 0.0;
    if (column < n) {
        const int q = exponents[column], most = *largest ? *largest - FARTHEST - 1 : 0;
        const float d = as_float((u32)(127 + (q == NONE ? most : -q)) << 23);
        for (int c = 0; c < 8; c++) vectors[column * 8 + c] = normals[c * n + column] * d;
        scales[column] = d;
        square = (double)d * (double)d;
    }
    for (int half = 16; half; half /= 2) square += __shfl_xor_sync(~0u, square, half);
    if (threadIdx.x % 32 == 0) atomicAdd(norm, square);
}

struct Bound { double quantile, incoherent, coherent, roundings, underflow; };

__device__ inline bool in_range(double energy) { return energy >= SMALLEST && energy <= LARGEST; }

// Thread a row. right, left: sums (m, 8) and marks (m, 3); bias (bias_rows, 8); norm: of d, squared.
template <typename T>
__device__ inline void judge_rows(
    const double* right, const double* right_marks, const double* left, const double* left_marks, const double* bias,
    i64 bias_rows, const double* norm, i64 m, i64 k, i64 n, Bound given, u64* mark) {
    const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= m) return;
    double square = 0.0, claimed = 0.0;
    for (int c = 0; c < 8; c++) {
        const double added = bias_rows ? bias[(bias_rows > 1 ? row : 0) * 8 + c] : 0.0;
        const double off = left[row * 8 + c] - right[row * 8 + c] - added;
        square += off * off;
        claimed += fabs(left[row * 8 + c]);
    }
    const double energy = right_marks[row * 3], probe = right_marks[row * 3 + 1];
    const double size_y = left_marks[row * 3], rounding = left_marks[row * 3 + 2];
    const double residual = sqrt(square), a = sqrt(energy), y = sqrt(size_y), larger = fmax(fmax(a, y), sqrt(probe));
    const double coherence = a > 0.0 ? fmin(1.0, 2.0 * larger / (sqrt((double)k) * a)) : 1.0;
    const double unit = 1.0 / (double)(1ll << Format<T>::p);
    const double accumulation = given.roundings + given.incoherent + given.coherent * coherence;
    const double bound = unit * sqrt(rounding) + accumulation * larger + sqrt(*norm) * given.underflow;
    const double rest = EVALUATION * sqrt((double)k * (double)n) * (a + y), threshold = given.quantile * bound + rest;
    bool passes = is_finite(energy) && is_finite(size_y) && is_finite(probe) && (a > 0.0 || y == 0.0);
    double evaluation = 2.0 * rest;
    if (sizeof(T) == 2) {
        evaluation += ERROR * (2.0 * given.quantile * larger + 4.0 * threshold);
        passes = passes && (energy == 0.0 || in_range(energy));
        passes = passes && (size_y == 0.0 && claimed == 0.0 || in_range(size_y) && in_range(rounding));
    }
    passes = passes && is_finite(threshold) && threshold > 0.0 && residual + evaluation <= threshold * Tally::ROOM;
    Tally tally;
    tally.judged = (u64)n;
    if (passes) tally.worst = residual / threshold;
    else tally.left = (u64)n;
    tally.report(mark);
}

// 512 threads: the registers of two blocks of 256.
#define FOLD_BLOCKS(NAME, T, V, CLAIMS)                                                                               \
    extern "C" __global__ void __launch_bounds__(512) NAME(                                                           \
        const T* matrix, const i64* at, const int placed, const i64 first, const i64 stride, const i64 m,             \
        const i64 n, const V* vectors, const V* scales, double* sums, double* marks) {                                \
        fold_blocks<T, V, CLAIMS>(matrix, at, placed, first, stride, m, n, vectors, scales, sums, marks);             \
    }

#define FOLD_FACTOR(V, SUFFIX)                                                                                        \
    extern "C" __global__ void __launch_bounds__(128) fold_factor_##SUFFIX(                                           \
        const double* sums, const double* marks, const int segments, const i64 m, V* vectors, V* scales) {            \
        fold_factor<V>(sums, marks, segments, m, vectors, scales);                                                    \
    }

#define KERNELS(T, SUFFIX)                                                                                            \
    FOLD_BLOCKS(fold_claims_##SUFFIX, T, float, true)                                                                 \
    FOLD_BLOCKS(fold_blocks_##SUFFIX, T, float, false)                                                                \
    extern "C" __global__ void __launch_bounds__(128) fold_columns_##SUFFIX(                                          \
        const T* matrix, const i64 first, const i64 stride, const i64 m, const i64 n, const float* vectors,           \
        const float* scales, double* sums, double* marks) {                                                           \
        fold_columns<T>(matrix, first, stride, m, n, vectors, scales, sums, marks);                                   \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) square_rows_##SUFFIX(                                           \
        const T* matrix, const i64 first, const i64 stride, const i64 rows, const i64 n, double* squares) {           \
        square_rows<T>(matrix, first, stride, rows, n, squares);                                                      \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) square_columns_##SUFFIX(                                        \
        const T* matrix, const i64 first, const i64 stride, const i64 n, const i64 rows, double* squares) {           \
        square_columns<T>(matrix, first, stride, n, rows, squares);                                                   \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) judge_rows_##SUFFIX(                                            \
        const double* right, const double* right_marks, const double* left, const double* left_marks,                 \
        const double* bias, const i64 bias_rows, const double* norm, const i64 m, const i64 k, const i64 n,           \
        const double quantile, const double incoherent, const double coherent, const double roundings,                \
        const double underflow, u64* mark) {                                                                          \
        const Bound bound = {quantile, incoherent, coherent, roundings, underflow};                                   \
        judge_rows<T>(right, right_marks, left, left_marks, bias, bias_rows, norm, m, k, n, bound, mark);             \
    }

KERNELS(bf16, bf16)
KERNELS(f16, f16)
KERNELS(float, f32)
FOLD_BLOCKS(fold_blocks_wide_f32, float, double, false)
FOLD_BLOCKS(fold_blocks_f64, double, float, false)
FOLD_FACTOR(float, f32)
FOLD_FACTOR(double, f64)
