// Claimed rows of attention against their inputs, as gpu/kernels/attention_radius.py has them, in float64.
//
// Six launches. Of each query row a table (rows, 5) int64 says where it starts in q (elements), where its claim starts
// in y, how many keys it may see, how many its tile scores, and where its mask starts. A tile is at most 8 rows that
// read the same keys and values; tiles (tiles, 4) int64: first row, rows, where the keys start in k, the values in v.
// A block takes 128 keys; scratch has `stride` keys a row, and `blocks` = stride / 128.
// 1 score_keys_*, grid (blocks, tiles), a thread a key: x (rows, stride) exact scores with bias, -inf where hidden; e
//   their radius; tops (rows, blocks) the largest of each block.
// 2 weigh_keys_*, grid (blocks, rows), a thread a key: in x the weight exp(x - top), in e how far a kernel's weight may
//   lie from it, in both -1 where hidden; sums (rows, blocks, 4) of weights, least weights, distances; largest doubt.
// 3 sum_values_*, grid (width / 64 x splits, tiles), a thread two columns of every fourth run of keys: parts (splits,
//   2, rows, width) of sum w v and of sum w |v|.
// 4 settle_rows_*, grid rows: z and size (2, rows, width), the parts' sums over that of weights; settled (rows, 3) the
//   sum of least weights, (4 weights + 3 distances) / that, and eps.
// 5 move_values_*, as 3: parts (splits, 1, rows, width) of sum distance |v - z|.
// 6 judge_attention_*, a thread an entry of y: the claim against z with slack = move / least + allowed size.
//
// Where kernels may round scores to T, a last bit of ours decides which way; so least and largest scores are taken
// `doubt` further inside, and distances here never exceed the reference's. With d terms a score two evaluations of it
// are at most doubt = (d + 34) 2^-52 (A + |x|) apart, A being sum |q k| scale, at most e / product. So weights, least
// and largest ones differ by relative 8 doubt + 2^-47 at most (those 800 below the top count in neither case), and
// sums of n terms by n 2^-50. With eps for both together z differs by 2 eps size, and slack exceeds the reference's by
// eps (3 slack + size (4 weights + 3 distances) / least) at most. Rows where the reference might overflow are left.

#include "judge.cuh"
#include "warp.cuh"

constexpr int KEYS = 128, ROWS = 8, DEPTH = 16, COLUMNS = 64, WARPS = KEYS / 32, RUN = 4;
constexpr double MOST_SCORE = 0x1p14, MOST_GROWTH = 100.0, LEAST_SUM = 0x1p-100, MOST_DOUBT = 0x1p-24;

struct Row { i64 q, y, limit, keys, mask; };
struct Tile { i64 first, rows, k, v; };
struct Errors { double scale, softcap, product, score, cap; };

__device__ inline double infinity() { return __longlong_as_double(2047ll << 52); }
__device__ inline double nan_of() { return __longlong_as_double(4095ll << 51); }

template <typename Join> __device__ inline double joined(const double (&warps)[WARPS], Join join) {
    return join(join(warps[0], warps[1]), join(warps[2], warps[3]));
}

// tile[c][threadIdx.x] = line[c], zero from `count` on (which may be negative).
template <typename T> __device__ inline void load_line(float (&tile)[DEPTH][KEYS], const T* line, i64 count) {
    constexpr int WIDTH = 16 / sizeof(T);
    if (count >= DEPTH && !((u64)line & 15)) {
#pragma unroll
        for (int c = 0; c < DEPTH; c += WIDTH) {
            const Piece<T> piece = *(const Piece<T>*)(line + c);
#pragma unroll
            for (int i = 0; i < WIDTH; i++) tile[c + i][threadIdx.x] = widen(piece.at[i]);
        }
    } else {
#pragma unroll 8
        for (int c = 0; c < DEPTH; c++) tile[c][threadIdx.x] = c < count ? widen(line[c]) : 0.0f;
    }
}

// What is added to score j of a row. A mask of 0 columns: none; of 1: for all keys; others hide keys beyond their end.
template <typename T>
__device__ inline double bias_of(const u8* mask, i64 columns, int boolean, const Row& row, i64 j) {
    const double hidden = j < row.limit ? 0.0 : -infinity();
    if (!columns) return hidden;
    if (columns > 1 && j >= columns) return -infinity();
    const i64 at = row.mask + (columns > 1 ? j : 0);
    if (boolean) return mask[at] ? hidden : -infinity();
    return hidden + (double)widen(((const T*)mask)[at]);
}

template <typename T>
__device__ inline void score(const T* q, const T* k, i64 k_stride, const u8* mask, i64 columns, int boolean,
                             const Tile* tiles, const Row* rows, i64 d, Errors may, i64 stride, double* x, double* e,
                             double* tops) {
    __shared__ float tile[DEPTH][KEYS];
    __shared__ __align__(16) double query[DEPTH][ROWS];
    __shared__ double room[WARPS];
    const Tile own = tiles[blockIdx.y];
    const i64 keys = rows[own.first].keys, start = (i64)blockIdx.x * KEYS, j = start + threadIdx.x;
    if (start >= keys) return;
    double products[ROWS] = {}, sizes[ROWS] = {};
    for (i64 from = 0; from < d; from += DEPTH) {
        load_line(tile, k + own.k + j * k_stride + from, j < keys ? d - from : 0);
        const int line = threadIdx.x / DEPTH, place = threadIdx.x % DEPTH;
        const bool there = line < own.rows && from + place < d;
        query[place][line] = there ? widen(q[rows[own.first + line].q + from + place]) : 0.0f;
        __syncthreads();
#pragma unroll 4
        for (int c = 0; c < DEPTH; c++) {
            const double value = (double)tile[c][threadIdx.x], size = fabs(value);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const double factor = query[c][i];
                products[i] = fma(factor, value, products[i]);
                sizes[i] = fma(fabs(factor), size, sizes[i]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        if (i < own.rows) {
            const i64 row = own.first + i;
            double exact = -infinity(), error = 0.0;
            if (j < keys) {
                const double bias = bias_of<T>(mask, columns, boolean, rows[row], j);
                if (!(bias == -infinity())) {
                    double found = may.scale * products[i];
                    error = may.product * fabs(may.scale) * sizes[i] + may.score * fabs(found);
                    if (may.softcap > 0.0) {
                        found = may.softcap * tanh(found / may.softcap);
                        error += may.score * 2.0 * fabs(found) + may.cap * may.softcap;
                    }
                    exact = is_finite(error) ? found + bias : nan_of();
                }
                x[row * stride + j] = exact;
                e[row * stride + j] = error;
            }
            const double top = over_warp(exact, Most());
            if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = top;
            __syncthreads();
            if (threadIdx.x == 0) tops[row * gridDim.x + blockIdx.x] = joined(room, Most());
            __syncthreads();
        }
}

// Nearest even in T, or infinity; `quantized` spills here.
template <typename T> __device__ inline double round_to(double value) {
    const i64 exponent = __double_as_longlong(value) >> 52 & 2047, least = Format<T>::e_min + 1023;
    const double quantum = __longlong_as_double((exponent > least ? exponent : least) - Format<T>::p + 1 << 52);
    const double beyond = __longlong_as_double((1025ll - Format<T>::e_min) << 52);
    const double rounded = rint(value / quantum) * quantum;
    return fabs(rounded) < beyond ? rounded : copysign(infinity(), rounded);
}
template <typename T> __device__ inline double downward(double value) {
    return fmin(fmin(value, (double)(float)value), round_to<T>(value));
}
template <typename T> __device__ inline double upward(double value) {
    return fmax(fmax(value, (double)(float)value), round_to<T>(value));
}

template <typename T>
__device__ inline void weigh(double* x, double* e, i64 stride, const double* tops, const Row* rows, i64 d,
                             double product, double exponent, double exponential, double* sums) {
    __shared__ double room[4][WARPS];
    const i64 keys = rows[blockIdx.y].keys, j = (i64)blockIdx.x * KEYS + threadIdx.x, at = blockIdx.y * stride + j;
    if ((i64)blockIdx.x * KEYS >= keys) return;
    double top = -infinity();
    for (i64 block = threadIdx.x % 32; block * KEYS < keys; block += 32)
        top = fmax(top, tops[(i64)blockIdx.y * gridDim.x + block]);
    top = over_warp(top, Most());
    double found[4] = {};
    if (j < keys) {
        const double exact = x[at], error = e[at];
        double weight = -1.0, distance = -1.0;
        if (!(exact == -infinity())) {
            const double doubt = (double)(d + 34) * 0x1p-52 * (error / product + fabs(exact));
            const double low = downward<T>(exact - error + doubt), high = upward<T>(exact + error - doubt);
            const double spread = exponent * (top - exact);
            const double least = exp(low - top - spread) * (1.0 - exponential);
            const double most = exp(high - top + spread) * (1.0 + exponential);
            const double growth = upward<T>(exact + error + doubt) - top + spread;
            weight = fabs(top) <= MOST_SCORE && growth <= MOST_GROWTH ? exp(exact - top) : nan_of();
            distance = fmax(most - weight, weight - least);
            found[0] = weight;
            found[1] = least;
            found[2] = distance;
            found[3] = exact + doubt - top > -800.0 || most > 0.0 ? doubt : 0.0;
        }
        x[at] = weight;
        e[at] = distance;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const double value = i < 3 ? over_warp(found[i], Add()) : over_warp(found[i], Most());
        if (threadIdx.x % 32 == 0) room[i][threadIdx.x / 32] = value;
    }
    __syncthreads();
    const int kind = threadIdx.x;
    if (kind < 4)
        sums[((i64)blockIdx.y * gridDim.x + blockIdx.x) * 4 + kind] =
            kind < 3 ? joined(room[kind], Add()) : joined(room[kind], Most());
}

// MOVING: sum weight |v - z|; else sum weight v and sum weight |v|. A key with a negative weight is not looked at.
template <typename T, bool MOVING>
__device__ inline void sum(const double* weights, i64 stride, const T* v, i64 v_stride, const Tile* tiles,
                           const Row* rows, i64 count, i64 width, int splits, const double* z, double* parts) {
    constexpr int KINDS = MOVING ? 1 : 2;
    __shared__ __align__(16) double weight[KEYS][ROWS];
    __shared__ double whole[KINDS][ROWS][COLUMNS];
    const Tile own = tiles[blockIdx.y];
    const i64 keys = rows[own.first].keys, split = blockIdx.x % splits, column = blockIdx.x / splits * COLUMNS;
    const i64 begin = keys * split / splits, end = keys * (split + 1) / splits;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double found[KINDS][ROWS][2] = {}, from[ROWS][2];
    bool inside[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const i64 c = column + lane + 32 * half;
        inside[half] = c < width;
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            from[i][half] = MOVING && inside[half] && i < own.rows ? z[(own.first + i) * width + c] : 0.0;
    }
    const T* values = v + own.v + column + lane;
    for (i64 first = begin; first < end; first += KEYS) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const bool there = i < own.rows && first + threadIdx.x < end;
            weight[threadIdx.x][i] = there ? weights[(own.first + i) * stride + first + threadIdx.x] : -1.0;
        }
        __syncthreads();
        for (int run = warp * RUN; run < KEYS; run += WARPS * RUN) {
            float value[RUN][2];
#pragma unroll
            for (int key = 0; key < RUN; key++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    value[key][half] = inside[half] && first + run + key < end
                                           ? widen(values[(first + run + key) * v_stride + 32 * half])
                                           : 0.0f;
#pragma unroll
            for (int key = 0; key < RUN; key++) {
                const double left = (double)value[key][0], right = (double)value[key][1];
#pragma unroll
                for (int i = 0; i < ROWS; i++) {
                    const double factor = weight[run + key][i];
                    if (__double_as_longlong(factor) < 0) continue;
                    if (MOVING) {
                        found[0][i][0] = fma(factor, fabs(left - from[i][0]), found[0][i][0]);
                        found[0][i][1] = fma(factor, fabs(right - from[i][1]), found[0][i][1]);
                    } else {
                        found[0][i][0] = fma(factor, left, found[0][i][0]);
                        found[0][i][1] = fma(factor, right, found[0][i][1]);
                        found[KINDS - 1][i][0] = fma(factor, fabs(left), found[KINDS - 1][i][0]);
                        found[KINDS - 1][i][1] = fma(factor, fabs(right), found[KINDS - 1][i][1]);
                    }
                }
            }
        }
        __syncthreads();
    }
    for (int turn = 0; turn < WARPS; turn++) {
        if (turn == warp)
#pragma unroll
            for (int kind = 0; kind < KINDS; kind++)
#pragma unroll
                for (int i = 0; i < ROWS; i++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        double* at = &whole[kind][i][lane + 32 * half];
                        *at = turn ? *at + found[kind][i][half] : found[kind][i][half];
                    }
        __syncthreads();
    }
    for (int at = threadIdx.x; at < KINDS * ROWS * COLUMNS; at += KEYS) {
        const int kind = at / (ROWS * COLUMNS), i = at / COLUMNS % ROWS, c = at % COLUMNS;
        if (i < own.rows && column + c < width)
            parts[((split * KINDS + kind) * count + own.first + i) * width + column + c] = whole[kind][i][c];
    }
}

template <typename T>
__device__ inline void settle(const T* q, i64 d, const Row* rows, i64 width, i64 blocks, const double* sums, int splits,
                              const double* parts, double* z, double* settled) {
    __shared__ double room[5][WARPS];
    const Row row = rows[blockIdx.x];
    double found[5] = {};
    for (i64 block = threadIdx.x; block * KEYS < row.keys; block += KEYS) {
        const double* of = sums + (blockIdx.x * blocks + block) * 4;
        for (int i = 0; i < 3; i++) found[i] += of[i];
        found[3] = fmax(found[3], of[3]);
    }
    for (i64 c = threadIdx.x; c < d; c += KEYS) found[4] += is_finite((double)widen(q[row.q + c])) ? 0.0 : 1.0;
#pragma unroll
    for (int i = 0; i < 5; i++) {
        const double value = i == 3 ? over_warp(found[i], Most()) : over_warp(found[i], Add());
        if (threadIdx.x % 32 == 0) room[i][threadIdx.x / 32] = value;
    }
    __syncthreads();
    const double weights = joined(room[0], Add()), doubt = joined(room[3], Most());
    const bool empty = weights == 0.0;  // a row without any key is zero; the weights of others are 1 at least
    const double least = empty ? 1.0 : joined(room[1], Add());
    const bool sound = joined(room[4], Add()) == 0.0 && least >= LEAST_SUM && doubt <= MOST_DOUBT;
    const double total = sound ? (empty ? 1.0 : weights) : nan_of();
    if (threadIdx.x == 0) {
        settled[blockIdx.x * 3] = least;
        settled[blockIdx.x * 3 + 1] = (4.0 * weights + 3.0 * joined(room[2], Add())) / least;
        settled[blockIdx.x * 3 + 2] = 8.0 * doubt + 0x1p-47 + (double)(row.keys + 16) * 0x1p-50;
    }
    const i64 entries = gridDim.x * width;
    for (i64 c = threadIdx.x; c < width; c += KEYS) {
        const i64 at = blockIdx.x * width + c;
        double weighted = 0.0, size = 0.0;
        for (i64 split = 0; split < splits; split++) {
            weighted += parts[2 * split * entries + at];
            size += parts[(2 * split + 1) * entries + at];
        }
        z[at] = weighted / total;
        z[entries + at] = size / total;
    }
}

template <typename T>
__device__ inline void judge(const double* z, const double* settled, const double* parts, int splits, const Row* rows,
                             const double* allowed, i64 count, i64 width, const T* y, u64* mark) {
    const i64 entries = count * width;
    Tally tally;
    for (i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x; at < entries; at += (i64)gridDim.x * blockDim.x) {
        const i64 row = at / width;
        const double *of = settled + row * 3, size = z[entries + at];
        double move = 0.0;
        for (i64 split = 0; split < splits; split++) move += parts[split * entries + at];
        const double slack = move / of[0] + allowed[row] * size;
        tally.entry(y[rows[row].y + at % width], z[at], slack, of[2] * (size * (2.0 + of[1]) + 3.0 * slack));
    }
    tally.report(mark);
}

#define KERNELS(T, SUFFIX)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128) score_keys_##SUFFIX(                                             \
        const T* q, const T* k, const i64 k_stride, const u8* mask, const i64 columns, const int boolean,              \
        const i64* tiles, const i64* rows, const i64 d, const double scale, const double softcap,                      \
        const double product, const double may, const double cap, const i64 stride, double* x, double* e,              \
        double* tops) {                                                                                                \
        score(q, k, k_stride, mask, columns, boolean, (const Tile*)tiles, (const Row*)rows, d,                         \
              Errors{scale, softcap, product, may, cap}, stride, x, e, tops);                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) weigh_keys_##SUFFIX(                                             \
        double* x, double* e, const i64 stride, const double* tops, const i64* rows, const i64 d,                      \
        const double product, const double exponent, const double exponential, double* sums) {                         \
        weigh<T>(x, e, stride, tops, (const Row*)rows, d, product, exponent, exponential, sums);                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) sum_values_##SUFFIX(                                             \
        const double* weights, const i64 stride, const T* v, const i64 v_stride, const i64* tiles, const i64* rows,    \
        const i64 count, const i64 width, const int splits, double* parts) {                                           \
        sum<T, false>(weights, stride, v, v_stride, (const Tile*)tiles, (const Row*)rows, count, width, splits,        \
                      nullptr, parts);                                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) settle_rows_##SUFFIX(                                            \
        const T* q, const i64 d, const i64* rows, const i64 width, const i64 blocks, const double* sums,               \
        const int splits, const double* parts, double* z, double* settled) {                                           \
        settle(q, d, (const Row*)rows, width, blocks, sums, splits, parts, z, settled);                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) move_values_##SUFFIX(                                            \
        const double* distances, const i64 stride, const T* v, const i64 v_stride, const i64* tiles, const i64* rows,  \
        const i64 count, const i64 width, const int splits, const double* z, double* parts) {                          \
        sum<T, true>(distances, stride, v, v_stride, (const Tile*)tiles, (const Row*)rows, count, width, splits, z,    \
                     parts);                                                                                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) judge_attention_##SUFFIX(                                        \
        const double* z, const double* settled, const double* parts, const int splits, const i64* rows,                \
        const double* allowed, const i64 count, const i64 width, const T* y, u64* mark) {                              \
        judge(z, settled, parts, splits, (const Row*)rows, allowed, count, width, y, mark);                            \
    }

KERNELS(bf16, bf16)
KERNELS(f16, f16)
KERNELS(float, f32)
