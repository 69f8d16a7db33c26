// Compiled before every file of kernels. NARROW is the element type that matrix products read and write: float, or bf16 as its
// bits. No header is included, so that NVRTC needs no include path.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;
typedef NARROW narrow;

#define UNROLL _Pragma("unroll")
#define KERNEL extern "C" __global__ void
#define INLINE __device__ __forceinline__
#define NEGATIVE_INFINITY __uint_as_float(0xff800000u)

// Dynamic shared memory, whose size is set by the launch.
#ifndef EMULATED
extern __shared__ uint4 dynamic_shared[];
#endif
#define DYNAMIC_SHARED(type, name) type* name = (type*)dynamic_shared

INLINE float load(const float* p) { return *p; }
INLINE float load(const bf16* p) { return __uint_as_float((u32)*p << 16); }

// The bits of the nearest bf16, ties to even. A NaN stays a NaN.
INLINE u32 round_bits(float x) {
    u32 bits = __float_as_uint(x);
    return x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
INLINE void store(float* p, float x) { *p = x; }
INLINE void store(bf16* p, float x) { *p = (bf16)round_bits(x); }

// Stores two neighbours, the first of which is at an even place.
INLINE void store_pair(float* p, float low, float high) {
    p[0] = low;
    p[1] = high;
}
INLINE void store_pair(bf16* p, float low, float high) { *(u32*)p = round_bits(low) | round_bits(high) << 16; }

// Copies to shared memory that are waited for later, in groups: 16 bytes (zeros unless `on`), and 4 bytes.
INLINE void copy_16(void* to, const void* from, bool on) {
#ifdef EMULATED
    later(to, on ? from : &zeros, 16);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(on ? 16 : 0));
#endif
}
INLINE void copy_4(void* to, const void* from, bool on) {
#ifdef EMULATED
    later(to, on ? from : &zeros, 4);
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(on ? 4 : 0));
#endif
}
INLINE void copies_end_group() {
#ifdef EMULATED
    end_group();
#else
    asm volatile("cp.async.commit_group;");
#endif
}
// Waits until at most N groups are under way.
template <int N> INLINE void copies_wait() {
#ifdef EMULATED
    wait_groups(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N));
#endif
}

// Reductions in a fixed order: a tree within each warp, then warp by warp. Every thread gets the result.
INLINE float warp_sum(float x) {
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}
INLINE float warp_max(float x) {
    for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}
INLINE float block_sum(float x) {
    __shared__ float parts[32];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.f;
    for (u32 i = 0; i < blockDim.x / 32; i++) sum += parts[i];
    return sum;
}
INLINE float block_max(float x) {
    __shared__ float parts[32];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float top = parts[0];
    for (u32 i = 1; i < blockDim.x / 32; i++) top = fmaxf(top, parts[i]);
    return top;
}

// Softcap of x, and its derivative given the softcapped value.
INLINE float softcapped(float x, float cap) { return cap > 0.f ? cap * tanhf(x / cap) : x; }
INLINE float softcap_slope(float y, float cap) { return cap > 0.f ? 1.f - (y / cap) * (y / cap) : 1.f; }

// A warp's product of 16 x 16 by 16 x 8, in the layout of mma.m16n8k16. With g = l / 4 and t = l % 4, thread l holds
//   of A the pairs (row g, columns 2t 2t+1), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8);
//   of B the pairs (rows 2t 2t+1, column g), (2t + 8, g);
//   of C the numbers (row g, columns 2t 2t+1), (g + 8, 2t 2t+1).
struct Floats { float low, high; };
// By shuffles. It is not inlined, which would make it most of a kernel's code and take most of the compiler's time.
struct Sums { float at[4]; };
__device__ __noinline__ Sums shuffled(Sums sums, Floats a0, Floats a1, Floats a2, Floats a3, Floats b0, Floats b1) {
    Floats a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    float* c = sums.at;
    int t = threadIdx.x % 4;
    UNROLL for (int k = 0; k < 16; k++) {
        // The threads that hold column k of A and row k of B.
        int half = k / 8, owner = k % 8 / 2, group = threadIdx.x % 32 / 4 * 4 + owner;
        float first = k % 2 ? a[2 * half].high : a[2 * half].low, second = k % 2 ? a[2 * half + 1].high : a[2 * half + 1].low;
        float x = k % 2 ? b[half].high : b[half].low;
        float up = __shfl_sync(0xffffffffu, first, group), down = __shfl_sync(0xffffffffu, second, group);
        float left = __shfl_sync(0xffffffffu, x, 8 * t + owner), right = __shfl_sync(0xffffffffu, x, 8 * t + 4 + owner);
        c[0] = fmaf(up, left, c[0]);
        c[1] = fmaf(up, right, c[1]);
        c[2] = fmaf(down, left, c[2]);
        c[3] = fmaf(down, right, c[3]);
    }
    return sums;
}
INLINE void mma(float c[4], const Floats a[4], const Floats b[2]) {
#if defined(EMULATED) && !defined(BY_SHUFFLES)
    emulated_mma(c, a, b);
#else
    Sums sums = shuffled({{c[0], c[1], c[2], c[3]}}, a[0], a[1], a[2], a[3], b[0], b[1]);
    UNROLL for (int i = 0; i < 4; i++) c[i] = sums.at[i];
#endif
}
INLINE void mma(float c[4], const u32 a[4], const u32 b[2]) {
#ifdef EMULATED
    Floats x[4], y[2];
    for (int i = 0; i < 4; i++) x[i] = {__uint_as_float(a[i] << 16), __uint_as_float(a[i] & 0xffff0000u)};
    for (int i = 0; i < 2; i++) y[i] = {__uint_as_float(b[i] << 16), __uint_as_float(b[i] & 0xffff0000u)};
    mma(c, x, y);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Two neighbouring elements of a factor.
template <typename T> struct PairOf;
template <> struct PairOf<float> { typedef Floats type; };
template <> struct PairOf<bf16> { typedef u32 type; };
typedef PairOf<narrow>::type Pair;
INLINE Floats pair_of(const float* low, const float* high) { return {*low, *high}; }
INLINE u32 pair_of(const bf16* low, const bf16* high) { return *low | (u32)*high << 16; }
INLINE void set_pair(Floats* p, float low, float high) { *p = {low, high}; }
INLINE void set_pair(u32* p, float low, float high) { *p = round_bits(low) | round_bits(high) << 16; }

#if !defined(EMULATED)
// Four 8 x 8 matrices of bf16, whose rows are at the addresses that threads 0 to 7, 8 to 15 and so on give.
INLINE void matrices(u32 m[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
}
INLINE void matrices_transposed(u32 m[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
}
#endif

// Fragments of a matrix in shared memory whose rows are `stride` elements apart, from (row, column) on.
// A: 16 rows and 16 columns.
template <typename T> INLINE void fragment_a(Pair a[4], const T* m, int stride, int row, int column) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    UNROLL for (int i = 0; i < 4; i++) {
        const T* p = m + (row + g + i % 2 * 8) * stride + column + 2 * t + i / 2 * 8;
        a[i] = pair_of(p, p + 1);
    }
}
// Two neighbouring fragments of B, whose 8 columns each are rows of the matrix, and whose 16 rows are columns.
template <typename T> INLINE void fragments_b(Pair b[2][2], const T* m, int stride, int row, int column) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    UNROLL for (int i = 0; i < 4; i++) {
        const T* p = m + (row + g + i / 2 * 8) * stride + column + 2 * t + i % 2 * 8;
        b[i / 2][i % 2] = pair_of(p, p + 1);
    }
}
// The same, whose 8 columns each are columns of the matrix, and whose 16 rows are rows.
template <typename T> INLINE void fragments_b_of_rows(Pair b[2][2], const T* m, int stride, int row, int column) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    UNROLL for (int i = 0; i < 4; i++) {
        const T* p = m + (row + 2 * t + i % 2 * 8) * stride + column + g + i / 2 * 8;
        b[i / 2][i % 2] = pair_of(p, p + stride);
    }
}
#if !defined(EMULATED)
INLINE void fragment_a(u32 a[4], const bf16* m, int stride, int row, int column) {
    int l = threadIdx.x % 32;
    matrices(a, m + (row + l % 16) * stride + column + l / 16 * 8);
}
INLINE void fragments_b(u32 b[2][2], const bf16* m, int stride, int row, int column) {
    int l = threadIdx.x % 32;
    matrices(b[0], m + (row + l % 8 + l / 16 * 8) * stride + column + l / 8 % 2 * 8);
}
INLINE void fragments_b_of_rows(u32 b[2][2], const bf16* m, int stride, int row, int column) {
    int l = threadIdx.x % 32;
    matrices_transposed(b[0], m + (row + l % 16) * stride + column + l / 16 * 8);
}
#endif
// Two neighbouring fragments of a result, converted to a fragment of A.
INLINE void fragment_c(Pair a[4], const float left[4], const float right[4]) {
    set_pair(&a[0], left[0], left[1]);
    set_pair(&a[1], left[2], left[3]);
    set_pair(&a[2], right[0], right[1]);
    set_pair(&a[3], right[2], right[3]);
}
