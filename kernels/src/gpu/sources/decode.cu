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

// Attention of the query heads of a row that share a key head, against that head's cache: one block of 128 threads per row and
// key head. A block reads 128 keys at a time, one per thread. Dynamic shared memory: queries [group][DIM], scores
// [group][128], sums [group][DIM], and three numbers per query.
#define SPAN 128
KERNEL attend(
    const narrow* qkv, const u32* slots, const u32* positions, const u32* active, Shape s, int capacity, const narrow* keys,
    const narrow* values, narrow* out) {
    DYNAMIC_SHARED(float, q);
    u32 row = blockIdx.x;
    int head = blockIdx.y, group = s.queries / s.keys;
    if (active && !active[row]) return;
    float* scores = q + group * DIM;
    float* sums = scores + group * SPAN;
    float *top = sums + group * DIM, *total = top + group, *shrink = total + group;
    for (int i = threadIdx.x; i < group * DIM; i += blockDim.x) {
        q[i] = load(qkv + (size_t)row * s.stride + head * group * DIM + i);
        sums[i] = 0.f;
    }
    for (int h = threadIdx.x; h < group; h += blockDim.x) {
        top[h] = NEGATIVE_INFINITY;
        total[h] = 0.f;
    }
    size_t base = ((size_t)slots[row] * s.keys + head) * capacity * DIM;
    int len = positions[row] + 1, begin = s.window > 0 ? max(0, len - s.window) : 0;
    for (int block = begin; block < len; block += SPAN) {
        int count = min(SPAN, len - block);
        __syncthreads();
        if ((int)threadIdx.x < count) {
            const narrow* key = keys + base + (size_t)(block + threadIdx.x) * DIM;
            for (int h = 0; h < group; h++) {
                float x = 0.f;
                for (int c = 0; c < DIM; c++) x = fmaf(q[h * DIM + c], load(key + c), x);
                scores[h * SPAN + threadIdx.x] = softcapped(x * s.scale, s.cap);
            }
        }
        __syncthreads();
        // One warp per query: the largest score so far, and the sum of exponentials relative to it.
        for (int h = threadIdx.x / 32; h < group; h += blockDim.x / 32) {
            float most = NEGATIVE_INFINITY, sum = 0.f;
            for (int j = threadIdx.x % 32; j < count; j += 32) most = fmaxf(most, scores[h * SPAN + j]);
            most = fmaxf(warp_max(most), top[h]);
            for (int j = threadIdx.x % 32; j < count; j += 32) {
                float e = expf(scores[h * SPAN + j] - most);
                scores[h * SPAN + j] = e;
                sum += e;
            }
            sum = warp_sum(sum);
            if (threadIdx.x % 32 == 0) {
                shrink[h] = top[h] == NEGATIVE_INFINITY ? 0.f : expf(top[h] - most);
                total[h] = total[h] * shrink[h] + sum;
                top[h] = most;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < group * DIM; i += blockDim.x) {
            int h = i / DIM, c = i % DIM;
            float x = sums[i] * shrink[h];
            const narrow* value = values + base + (size_t)block * DIM + c;
            for (int j = 0; j < count; j++) x = fmaf(scores[h * SPAN + j], load(value + (size_t)j * DIM), x);
            sums[i] = x;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group * DIM; i += blockDim.x)
        store(out + ((size_t)row * s.queries + head * group) * DIM + i, sums[i] / total[i / DIM]);
}

// Copies the first `len` tokens of a slot of a layer's keys or values to another slot. One block per key head.
KERNEL copy_prefix(narrow* cache, int heads, int capacity, u32 from, u32 to, int len) {
    size_t size = (size_t)capacity * DIM;
    const narrow* a = cache + ((size_t)from * heads + blockIdx.x) * size;
    narrow* b = cache + ((size_t)to * heads + blockIdx.x) * size;
    for (size_t i = threadIdx.x; i < (size_t)len * DIM; i += blockDim.x) b[i] = a[i];
}
