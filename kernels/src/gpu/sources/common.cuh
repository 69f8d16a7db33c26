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
INLINE void mma(float c[4], const Floats a[4], const Floats b[2]) {
#if defined(EMULATED) && !defined(BY_SHUFFLES)
    emulated_mma(c, a, b);
#else
    int t = threadIdx.x % 4;
    UNROLL for (int k = 0; k < 16; k++) {
        // The threads that hold column k of A and row k of B.
        int half = k / 8, owner = k % 8 / 2, group = threadIdx.x % 32 / 4 * 4 + owner;
        float a0 = k % 2 ? a[2 * half].high : a[2 * half].low, a1 = k % 2 ? a[2 * half + 1].high : a[2 * half + 1].low;
        float b0 = k % 2 ? b[half].high : b[half].low;
        float up = __shfl_sync(0xffffffffu, a0, group), down = __shfl_sync(0xffffffffu, a1, group);
        float left = __shfl_sync(0xffffffffu, b0, 8 * t + owner), right = __shfl_sync(0xffffffffu, b0, 8 * t + 4 + owner);
        c[0] = fmaf(up, left, c[0]);
        c[1] = fmaf(up, right, c[1]);
        c[2] = fmaf(down, left, c[2]);
        c[3] = fmaf(down, right, c[3]);
    }
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
INLINE void pair_of(Floats* p, float low, float high) { *p = {low, high}; }
INLINE void pair_of(u32* p, float low, float high) { *p = round_bits(low) | round_bits(high) << 16; }
