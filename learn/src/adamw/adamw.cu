// AdamW: updates parameter and moments in one pass. Moments are f32, bf16, or eight bits with a scale per block of 256. bf16 and
// eight bits are rounded stochastically, with the same random numbers as on the CPU.
typedef unsigned char u8;

struct Rule { float beta1, beta2, decay, rate, root, eps, scale; u32 salt1, salt2, from; };

INLINE u32 scramble(u32 h) {
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    return h ^ (h >> 16);
}
INLINE void blend(const Rule& r, float g, float* m, float* v) {
    g *= r.scale;
    *m = r.beta1 * *m + (1.f - r.beta1) * g;
    *v = r.beta2 * *v + (1.f - r.beta2) * (g * g);
}
INLINE float moved(const Rule& r, float p, float m, float v) {
    return p * r.decay - r.rate * m / (sqrtf(v) / r.root + r.eps);
}

KERNEL adamw_f32(float* p, float* m, float* v, const float* g, size_t n, Rule r) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float first = m[i], second = v[i];
    blend(r, g[i], &first, &second);
    m[i] = first;
    v[i] = second;
    p[i] = moved(r, p[i], first, second);
}

INLINE bf16 round_stochastic(float x, u32 seed) {
    u32 bits = __float_as_uint(x);
    bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return (bf16)((finite ? bits + (scramble(seed) & 0xffffu) : bits) >> 16);
}
KERNEL adamw_bf16(float* p, bf16* m, bf16* v, const float* g, size_t n, Rule r) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float first = load(m + i), second = load(v + i);
    blend(r, g[i], &first, &second);
    m[i] = round_stochastic(first, (r.from + (u32)i) ^ r.salt1);
    v[i] = round_stochastic(second, (r.from + (u32)i) ^ r.salt2);
    p[i] = moved(r, p[i], load(m + i), load(v + i));
}

INLINE float decode(u32 code, u32 levels) { return code == 0 ? 0.f : __uint_as_float((code + 0x3f8u - levels) << 20); }
INLINE u32 encode(float x, u32 levels, u32 seed) {
    u32 random = scramble(seed), base = 0x3f8u - levels;
    float least = decode(1, levels);
    if (x < least) return (random >> 8) * (1.f / 16777216.f) < x / least ? 1 : 0;
    u32 code = (__float_as_uint(x) + (random & 0xfffffu)) >> 20;
    code = code > base ? code - base : 1;
    return code > levels ? levels : code;
}
INLINE float with_sign(u8 code) {
    float size = decode(code & 127u, 127);
    return code & 128u ? -size : size;
}
// One block of 256 threads per block of 256 moments.
KERNEL adamw_int8(
    float* p, u8* m, float* m_scales, u8* v, float* v_scales, const float* g, size_t n, Rule r) {
    __shared__ float m_tops[256], v_tops[256];
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    float first = 0.f, second = 0.f;
    if (i < n) {
        first = with_sign(m[i]) * m_scales[blockIdx.x];
        second = decode(v[i], 255) * v_scales[blockIdx.x];
        blend(r, g[i], &first, &second);
    }
    m_tops[threadIdx.x] = fabsf(first);
    v_tops[threadIdx.x] = second;
    for (int half = 128; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            m_tops[threadIdx.x] = fmaxf(m_tops[threadIdx.x], m_tops[threadIdx.x + half]);
            v_tops[threadIdx.x] = fmaxf(v_tops[threadIdx.x], v_tops[threadIdx.x + half]);
        }
    }
    __syncthreads();
    float m_top = m_tops[0], v_top = v_tops[0];
    if (threadIdx.x == 0) {
        m_scales[blockIdx.x] = m_top;
        v_scales[blockIdx.x] = v_top;
    }
    if (i >= n) return;
    float x = m_top > 0.f ? first * (1.f / m_top) : 0.f, y = v_top > 0.f ? second * (1.f / v_top) : 0.f;
    m[i] = (u8)(encode(fabsf(x), 127, (r.from + (u32)i) ^ r.salt1) | (x < 0.f ? 128u : 0u));
    v[i] = (u8)encode(y, 255, (r.from + (u32)i) ^ r.salt2);
    p[i] = moved(r, p[i], with_sign(m[i]) * m_top, decode(v[i], 255) * v_top);
}

// Sums of squares of the blocks of 65,536 elements, each summed in the same order every time. 256 threads per block.
#define SQUARED 65536
KERNEL squares(const float* x, size_t n, double* sums) {
    __shared__ double parts[256];
    size_t first = (size_t)blockIdx.x * SQUARED, end = first + SQUARED < n ? first + SQUARED : n;
    double sum = 0.0;
    for (size_t i = first + threadIdx.x; i < end; i += 256) sum += (double)x[i] * (double)x[i];
    parts[threadIdx.x] = sum;
    for (int half = 128; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = parts[0];
}
