// Decoding: writing keys and values to the KV cache, and attention against it. What changes from token to token is on the
// device, so that every step is the same sequence of launches.
//
// The cache of a layer is [slots][key heads][capacity][DIM] for keys, and the same for values.

struct Shape { int queries, keys, stride, key_at, value_at, window; float scale, cap; };

// Writes the keys and values of rows to the cache, at the rows' slots and positions. One block per row.
KERNEL append(
    const narrow* qkv, const u32* slots, const u32* positions, const u32* active, Shape s, int capacity, narrow* keys,
    narrow* values) {
    u32 row = blockIdx.x;
    if (active && !active[row]) return;
    for (int i = threadIdx.x; i < s.keys * DIM; i += blockDim.x) {
        int head = i / DIM, c = i % DIM;
        size_t to = (((size_t)slots[row] * s.keys + head) * capacity + positions[row]) * DIM + c;
        keys[to] = qkv[(size_t)row * s.stride + s.key_at + i];
        values[to] = qkv[(size_t)row * s.stride + s.value_at + i];
    }
}

// Attention by LANES threads per key, each with EACH elements of it; EACH is what 16 bytes hold, or more for wide heads.
#define WIDE (16 / (int)sizeof(narrow))
#define EACH (DIM > 32 * WIDE ? 2 * WIDE : WIDE)
#define LANES (DIM > 16 * EACH ? 32 : DIM > 8 * EACH ? 16 : DIM > 4 * EACH ? 8 : DIM > 2 * EACH ? 4 : DIM > EACH ? 2 : 1)
#define THREADS 128
#define TEAMS (THREADS / LANES) // keys at a time
#define AHEAD 4                 // keys of a team whose loads are under way together
#define SPAN 128                // keys per block
#define GROUP 4                 // queries at a time

// EACH elements from the c-th on; those from DIM on are zeros.
INLINE void load_each(float x[EACH], const narrow* p, int c) {
    if (DIM % WIDE == 0) {
        UNROLL for (int w = 0; w < EACH / WIDE; w++) {
            uint4 bits = {0, 0, 0, 0};
            if (c + w * WIDE < DIM) bits = *(const uint4*)(p + c + w * WIDE);
            u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
            UNROLL for (int i = 0; i < WIDE; i++)
                x[w * WIDE + i] = sizeof(narrow) == 4 ? __uint_as_float(words[i * 4 / WIDE])
                                  : __uint_as_float(i % 2 ? words[i * 4 / WIDE] & 0xffff0000u : words[i * 4 / WIDE] << 16);
        }
        return;
    }
    UNROLL for (int i = 0; i < EACH; i++) x[i] = c + i < DIM ? load(p + c + i) : 0.f;
}
INLINE float team_sum(float x) {
    UNROLL for (int o = LANES / 2; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

// A running softmax: the largest score in units of log 2, the sum of exponentials, and the weighted sum of values.
INLINE void merge(float* top, float* total, float sums[EACH], float other_top, float other_total, const float* others) {
    float now = fmaxf(*top, other_top), base = now == NEGATIVE_INFINITY ? 0.f : now;
    float mine = exp2f(*top - base), theirs = exp2f(other_top - base);
    UNROLL for (int i = 0; i < EACH; i++) sums[i] = sums[i] * mine + others[i] * theirs;
    *total = *total * mine + other_total * theirs;
    *top = now;
}

// Attention of the query heads of a row that share a key head. Blocks (row, key head, span) take SPAN keys each and write their
// sums to `parts` [row][query head][span][DIM + 2]; the last of a row and key head, by `arrived`, merges them in order.
KERNEL attend(
    const narrow* qkv, const u32* slots, const u32* positions, const u32* active, Shape s, int capacity, const narrow* keys,
    const narrow* values, int spans, float* parts, u32* arrived, narrow* out) {
    __shared__ float tops[TEAMS], totals[TEAMS], team_sums[TEAMS][LANES * EACH];
    __shared__ u32 last;
    u32 row = blockIdx.x / spans, span = blockIdx.x % spans;
    int head = blockIdx.y, group = s.queries / s.keys;
    if (active && !active[row]) return;
    int len = positions[row] + 1, begin = s.window > 0 ? max(0, len - s.window) / SPAN * SPAN : 0;
    int first = begin + span * SPAN, needed = (len - begin + SPAN - 1) / SPAN;
    if (first >= len) return;
    int end = min(first + SPAN, len), least = s.window > 0 ? max(0, len - s.window) : 0;
    int team = threadIdx.x / LANES, c = threadIdx.x % LANES * EACH;
    size_t base = ((size_t)slots[row] * s.keys + head) * capacity * DIM;
    float scale = s.cap > 0.f ? s.scale : s.scale * 1.4426950408889634f;
    for (int from = 0; from < group; from += GROUP) {
        int count = min(GROUP, group - from);
        float q[GROUP][EACH], sums[GROUP][EACH] = {}, top[GROUP], total[GROUP] = {};
        UNROLL for (int h = 0; h < GROUP; h++) {
            top[h] = NEGATIVE_INFINITY;
            if (h < count) load_each(q[h], qkv + (size_t)row * s.stride + (head * group + from + h) * DIM, c);
        }
        // All threads of a warp go through as many rounds, as they exchange numbers.
        for (int round = first; round < end; round += TEAMS * AHEAD) {
            float k[AHEAD][EACH], v[AHEAD][EACH];
            UNROLL for (int j = 0; j < AHEAD; j++) {
                int key = round + j * TEAMS + team, at = min(key, end - 1);
                load_each(k[j], keys + base + (size_t)at * DIM, c);
                load_each(v[j], values + base + (size_t)at * DIM, c);
            }
            UNROLL for (int h = 0; h < GROUP; h++) {
                if (h >= count) break;
                float y[AHEAD], most = top[h];
                UNROLL for (int j = 0; j < AHEAD; j++) {
                    int key = round + j * TEAMS + team;
                    float x = 0.f;
                    UNROLL for (int i = 0; i < EACH; i++) x = fmaf(q[h][i], k[j][i], x);
                    x = team_sum(x) * scale;
                    if (s.cap > 0.f) x = softcapped(x, s.cap) * 1.4426950408889634f;
                    y[j] = key < end && key >= least ? x : NEGATIVE_INFINITY;
                    most = fmaxf(most, y[j]);
                }
                float floor = most == NEGATIVE_INFINITY ? 0.f : most, shrink = exp2f(top[h] - floor);
                top[h] = most;
                total[h] *= shrink;
                UNROLL for (int i = 0; i < EACH; i++) sums[h][i] *= shrink;
                UNROLL for (int j = 0; j < AHEAD; j++) {
                    float p = exp2f(y[j] - floor);
                    total[h] += p;
                    UNROLL for (int i = 0; i < EACH; i++) sums[h][i] = fmaf(p, v[j][i], sums[h][i]);
                }
            }
        }
        // The teams' sums, in order.
        UNROLL for (int h = 0; h < GROUP; h++) {
            if (h >= count) break;
            __syncthreads();
            if (c == 0) {
                tops[team] = top[h];
                totals[team] = total[h];
            }
            UNROLL for (int i = 0; i < EACH; i++) team_sums[team][c + i] = sums[h][i];
            __syncthreads();
            if (team == 0) {
                for (int j = 1; j < TEAMS; j++) merge(&top[h], &total[h], sums[h], tops[j], totals[j], team_sums[j] + c);
                size_t query = (size_t)row * s.queries + head * group + from + h;
                float* part = parts + (query * spans + span) * (DIM + 2);
                UNROLL for (int i = 0; i < EACH; i++) {
                    if (c + i >= DIM) continue;
                    if (needed == 1) store(out + query * DIM + c + i, sums[h][i] / total[h]);
                    else part[c + i] = sums[h][i];
                }
                if (c == 0 && needed > 1) {
                    part[DIM] = top[h];
                    part[DIM + 1] = total[h];
                }
            }
        }
    }
    if (needed == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(&arrived[row * s.keys + head], needed - 1) == (u32)needed - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int i = threadIdx.x; i < group * DIM; i += blockDim.x) {
        size_t query = (size_t)row * s.queries + head * group + i / DIM;
        const float* part = parts + query * spans * (DIM + 2);
        float most = NEGATIVE_INFINITY, sum = 0.f, total = 0.f;
        for (int j = 0; j < needed; j++) most = fmaxf(most, part[(size_t)j * (DIM + 2) + DIM]);
        for (int j = 0; j < needed; j++) {
            const float* p = part + (size_t)j * (DIM + 2);
            float share = exp2f(p[DIM] - most);
            sum = fmaf(p[i % DIM], share, sum);
            total = fmaf(p[DIM + 1], share, total);
        }
        store(out + query * DIM + i % DIM, sum / total);
    }
}

// Copies the first `len` tokens of a slot of a layer's keys or values to another slot. One block per key head.
KERNEL copy_prefix(narrow* cache, int heads, int capacity, u32 from, u32 to, int len) {
    size_t size = (size_t)capacity * DIM;
    const narrow* a = cache + ((size_t)from * heads + blockIdx.x) * size;
    narrow* b = cache + ((size_t)to * heads + blockIdx.x) * size;
    for (size_t i = threadIdx.x; i < (size_t)len * DIM; i += blockDim.x) b[i] = a[i];
}
