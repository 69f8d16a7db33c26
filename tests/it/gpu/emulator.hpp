// A GPU made of fibers: every thread of a block is one, and they take turns at barriers. What the kernels' sources need of
// CUDA, for a C++ compiler.
#define EMULATED
#include <csetjmp>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static

struct uint4 { unsigned x, y, z, w; };
struct Index { unsigned x, y; };
static Index threadIdx, blockIdx, blockDim, gridDim;
static unsigned char* dynamic_shared;

template <class T> static T min(T a, T b) { return b < a ? b : a; }
template <class T> static T max(T a, T b) { return a < b ? b : a; }
static inline float __uint_as_float(unsigned x) { float f; memcpy(&f, &x, 4); return f; }
static inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
template <class T> static T atomicAdd(T* p, T x) { T old = *p; *p += x; return old; }
template <class T> static T atomicMin(T* p, T x) { T old = *p; if (x < old) *p = x; return old; }

namespace fibers {
enum State { READY, AT_WARP, AT_BLOCK, DONE };
struct Fiber {
    ucontext_t first;
    jmp_buf there;
    bool started = false;
    State state = DONE;
    std::vector<unsigned char> stack;
    float slots[12];
    // Asynchronous copies to shared memory that are not waited for yet, and the number of finished groups before each.
    struct Copy { void* to; const void* from; unsigned bytes, group; };
    std::vector<Copy> copies;
    unsigned group = 0;
};
static std::vector<Fiber*> all;
static jmp_buf scheduler;
static unsigned current;
static void (*job)(void*);
static void* job_data;

static void body() {
    for (;;) {
        job(job_data);
        all[current]->state = DONE;
        if (!_setjmp(all[current]->there)) _longjmp(scheduler, 1);
    }
}

// Leaves the running fiber until it may go on.
static void wait(State state) {
    all[current]->state = state;
    if (!_setjmp(all[current]->there)) _longjmp(scheduler, 1);
}

static void resume(unsigned i) {
    current = i;
    threadIdx = {i % blockDim.x, i / blockDim.x};
    if (_setjmp(scheduler)) return;
    if (all[i]->started) _longjmp(all[i]->there, 1);
    all[i]->started = true;
    setcontext(&all[i]->first);
}

// Which thread runs next: the order is another one for every block, by a seed; 0 is the order of their numbers.
static unsigned seed;
static std::vector<unsigned> order;
static void shuffle(unsigned threads) {
    order.resize(threads);
    for (unsigned i = 0; i < threads; i++) order[i] = i;
    static unsigned state;
    if (seed && !state) state = seed;
    for (unsigned i = threads; seed && i > 1; i--) {
        state = state * 1664525u + 1013904223u;
        std::swap(order[i - 1], order[(state >> 8) % i]);
    }
}

static void run_block(unsigned threads) {
    shuffle(threads);
    while (all.size() < threads) {
        Fiber* fiber = new Fiber;
        fiber->stack.resize(1 << 18);
        getcontext(&fiber->first);
        fiber->first.uc_stack.ss_sp = fiber->stack.data();
        fiber->first.uc_stack.ss_size = fiber->stack.size();
        fiber->first.uc_link = nullptr;
        makecontext(&fiber->first, body, 0);
        all.push_back(fiber);
    }
    for (unsigned i = 0; i < threads; i++) {
        all[i]->state = READY;
        all[i]->copies.clear();
    }
    for (;;) {
        for (unsigned i : order)
            if (all[i]->state == READY) resume(i);
        // Nobody runs: whoever is complete at its barrier goes on.
        bool moved = false, done = true, block = true;
        for (unsigned first = 0; first < threads; first += 32) {
            unsigned end = min(first + 32, threads);
            bool warp = false, other = false;
            for (unsigned i = first; i < end; i++) {
                State s = all[i]->state;
                warp |= s == AT_WARP;
                other |= s == AT_BLOCK;
                done &= s == DONE;
            }
            if (warp && !other) {
                for (unsigned i = first; i < end; i++)
                    if (all[i]->state == AT_WARP) all[i]->state = READY;
                moved = true;
            }
            block &= !warp;
        }
        if (done) return;
        if (!moved && !block) abort(); // a warp that does not agree on its barrier
        if (!moved)
            for (unsigned i = 0; i < threads; i++)
                if (all[i]->state == AT_BLOCK) all[i]->state = READY;
    }
}
}  // namespace fibers

static inline unsigned thread_number() { return threadIdx.y * blockDim.x + threadIdx.x; }
static void __threadfence() {}
static unsigned atomicInc(unsigned* p, unsigned last) { unsigned old = *p; *p = old >= last ? 0 : old + 1; return old; }

// A copy is made when it is waited for, as late as it may be.
static const uint4 zeros = {};
static void later(void* to, const void* from, unsigned bytes) {
    fibers::Fiber* me = fibers::all[thread_number()];
    me->copies.push_back({to, from, bytes, me->group});
}
static void end_group() { fibers::all[thread_number()]->group++; }
static void wait_groups(unsigned under_way) {
    fibers::Fiber* me = fibers::all[thread_number()];
    size_t done = 0;
    for (; done < me->copies.size() && me->copies[done].group + under_way < me->group; done++)
        memcpy(me->copies[done].to, me->copies[done].from, me->copies[done].bytes);
    me->copies.erase(me->copies.begin(), me->copies.begin() + done);
}

static void __syncthreads() { fibers::wait(fibers::AT_BLOCK); }
static float __shfl_sync(unsigned, float x, int lane) {
    unsigned me = thread_number();
    fibers::all[me]->slots[0] = x;
    fibers::wait(fibers::AT_WARP);
    float got = fibers::all[me / 32 * 32 + lane]->slots[0];
    fibers::wait(fibers::AT_WARP);
    return got;
}
static float __shfl_xor_sync(unsigned mask, float x, int lanes) {
    return __shfl_sync(mask, x, (int)(thread_number() % 32) ^ lanes);
}

#ifndef BY_SHUFFLES
// mma.m16n8k16 in one exchange.
template <class A> static void emulated_mma(float* c, const A* a, const A* b) {
    unsigned me = thread_number(), warp = me / 32 * 32, g = me % 32 / 4, t = me % 4;
    float* mine = fibers::all[me]->slots;
    for (int i = 0; i < 4; i++) { mine[2 * i] = a[i].low; mine[2 * i + 1] = a[i].high; }
    for (int i = 0; i < 2; i++) { mine[8 + 2 * i] = b[i].low; mine[9 + 2 * i] = b[i].high; }
    fibers::wait(fibers::AT_WARP);
    for (int k = 0; k < 16; k++) {
        int half = k / 8, owner = k % 8 / 2, odd = k % 2;
        const float* row = fibers::all[warp + g * 4 + owner]->slots;
        float up = row[4 * half + odd], down = row[4 * half + 2 + odd];
        float left = fibers::all[warp + 8 * t + owner]->slots[8 + 2 * half + odd];
        float right = fibers::all[warp + 8 * t + 4 + owner]->slots[8 + 2 * half + odd];
        c[0] = fmaf(up, left, c[0]);
        c[1] = fmaf(up, right, c[1]);
        c[2] = fmaf(down, left, c[2]);
        c[3] = fmaf(down, right, c[3]);
    }
    fibers::wait(fibers::AT_WARP);
}
#endif

// Kernels called with their arguments as the bytes of a launch.
template <class T> static T argument(void* p) { T x; memcpy((void*)&x, p, sizeof(T)); return x; }
template <class... P> struct Bound {
    void (*kernel)(P...);
    void** arguments;
    template <size_t... I> void call(std::index_sequence<I...>) { kernel(argument<P>(arguments[I])...); }
    static void go(void* self) { ((Bound*)self)->call(std::index_sequence_for<P...>()); }
};
template <class... P>
static void launch(void (*kernel)(P...), const unsigned* shape, void** arguments) {
    Bound<P...> bound{kernel, arguments};
    gridDim = {shape[0], shape[1]};
    blockDim = {shape[2], shape[3]};
    // Uninitialised shared memory reads as NaN.
    std::vector<uint4> shared(shape[4] / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u});
    fibers::seed = shape[5];
    dynamic_shared = (unsigned char*)shared.data();
    fibers::job = Bound<P...>::go;
    fibers::job_data = &bound;
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) fibers::run_block(blockDim.x * blockDim.y);
}
template <class... P> static size_t sizes(void (*)(P...), size_t* out) {
    size_t all[] = {sizeof(P)..., 0};
    memcpy(out, all, sizeof...(P) * sizeof(size_t));
    return sizeof...(P);
}
#define EXPORT(name)                                                                                     \
    extern "C" void launch_##name(const unsigned* shape, void** arguments) { launch(name, shape, arguments); } \
    extern "C" size_t sizes_##name(size_t* out) { return sizes(name, out); }
