// CUDA's words for a C++ compiler of the host: a block's threads are fibres that take turns at barriers and shuffles.
// Single-threaded: atomics are plain, and races are not modelled. A block that stops at different places is reported.

#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __restrict__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct Place { unsigned x, y, z; };
static Place threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

template <typename To, typename From> static inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
static inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
static inline double __longlong_as_double(long long x) { return same_bits<double>(x); }
static inline long long __double_as_longlong(double x) { return same_bits<long long>(x); }
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    by &= 31;
    return by ? low >> by | high << (32 - by) : low;
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    by &= 31;
    return by ? high << by | low >> (32 - by) : high;
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
template <typename T> static inline T __ldg(const T* at) { return *at; }
template <typename T> static inline T atomicMax(T* at, T value) {
    const T old = *at;
    if (value > old) *at = value;
    return old;
}
template <typename T> static inline T atomicAdd(T* at, T value) {
    const T old = *at;
    *at += value;
    return old;
}
template <typename T> static inline T atomicOr(T* at, T value) {
    const T old = *at;
    *at |= value;
    return old;
}
template <typename T> static inline T min(T a, T b) { return b < a ? b : a; }
template <typename T> static inline T max(T a, T b) { return a < b ? b : a; }

enum State { READY, AT_BLOCK, AT_WARP, DONE };
struct Fibre {
    ucontext_t context;
    jmp_buf place;  // where it left off: a switch by longjmp leaves the signal mask alone, which costs two system calls
    bool begun;
    State state;
    unsigned shuffles;
    char* stack;
};
static const size_t STACK = 1 << 16;
static std::vector<Fibre> fibres;
static unsigned running;
static ucontext_t scheduler;
static jmp_buf turn_over;
static unsigned long long exchanged[2][1024];
static void (*body)(void*);
static void* body_argument;

static inline void wait_at(State state) {
    fibres[running].state = state;
    if (!_setjmp(fibres[running].place)) _longjmp(turn_over, 1);
}
static inline void __syncthreads() { wait_at(AT_BLOCK); }
static inline void __syncwarp(unsigned = ~0u) { wait_at(AT_WARP); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}

template <typename T> static inline T shuffled(T value, unsigned from, int width) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    const unsigned own = running, group = own / width * width;
    unsigned long long word = 0;
    memcpy(&word, &value, sizeof value);
    const unsigned turn = fibres[own].shuffles++ & 1;
    exchanged[turn][own] = word;
    wait_at(AT_WARP);
    const unsigned source = from < (unsigned)width ? group + from : own;
    memcpy(&value, &exchanged[turn][source], sizeof value);
    return value;
}
template <typename T> static inline T __shfl_sync(unsigned, T value, int lane, int width = 32) {
    return shuffled(value, (unsigned)lane % width, width);
}
template <typename T> static inline T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
    return shuffled(value, running % width ^ mask, width);
}
template <typename T> static inline T __shfl_down_sync(unsigned, T value, unsigned by, int width = 32) {
    return shuffled(value, running % width + by, width);
}
template <typename T> static inline T __shfl_up_sync(unsigned, T value, unsigned by, int width = 32) {
    return shuffled(value, running % width - by, width);
}
static inline unsigned __ballot_sync(unsigned, int predicate) {
    unsigned bits = predicate ? 1u << running % 32 : 0u;
    for (int mask = 16; mask; mask /= 2) bits |= __shfl_xor_sync(~0u, bits, mask);
    return bits;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

static void fibre_main() {
    body(body_argument);
    fibres[running].state = DONE;
    _longjmp(turn_over, 1);
}

// Lets those on whom nobody waits go on. 1: some may; 0: all are done; -1: they wait at different places.
static int release(unsigned threads) {
    unsigned ready = 0, done = 0, at_block = 0;
    for (unsigned first = 0; first < threads; first += 32) {
        const unsigned last = first + 32 < threads ? first + 32 : threads;
        unsigned waiting = 0;
        for (unsigned i = first; i < last; i++) {
            waiting += fibres[i].state == AT_WARP;
            at_block += fibres[i].state == AT_BLOCK;
            done += fibres[i].state == DONE;
        }
        if (waiting == last - first) {
            for (unsigned i = first; i < last; i++) fibres[i].state = READY;
            ready += waiting;
        }
    }
    if (ready) return 1;
    if (done == threads) return 0;
    if (at_block != threads) return -1;
    for (unsigned i = 0; i < threads; i++) fibres[i].state = READY;
    return 1;
}

static int run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; i++) {
        Fibre& fibre = fibres[i];
        fibre.state = READY;
        fibre.begun = false;
        fibre.shuffles = 0;
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack;
        fibre.context.uc_stack.ss_size = STACK;
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, fibre_main, 0);
    }
    for (;;) {
        for (unsigned i = 0; i < threads; i++) {
            if (fibres[i].state != READY) continue;
            running = i;
            threadIdx = {i, 0, 0};
            if (_setjmp(turn_over)) continue;
            if (fibres[i].begun) _longjmp(fibres[i].place, 1);
            fibres[i].begun = true;
            setcontext(&fibres[i].context);
        }
        const int next = release(threads);
        if (next < 1) return next;
    }
}

template <typename Body> static int run_grid(unsigned x, unsigned y, unsigned threads, bool alone, Body call) {
    body = [](void* argument) { (*(Body*)argument)(); };
    body_argument = &call;
    gridDim = {x, y, 1};
    blockDim = {threads, 1, 1};
    while (!alone && fibres.size() < threads) fibres.push_back({{}, {}, false, DONE, 0, new char[STACK]});
    for (blockIdx.y = 0; blockIdx.y < y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < x; blockIdx.x++) {
            if (!alone && run_block(threads)) return -1;
            for (unsigned i = 0; alone && i < threads; i++) {
                threadIdx = {i, 0, 0};
                call();
            }
        }
    return 0;
}
