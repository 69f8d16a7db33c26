// Causal grouped-query attention over packed sequences: on tensor cores in bf16, with the same fragments in f32 otherwise. Scores
// exist in registers only; the backward pass recomputes probabilities from the scores' log-sum-exp.
//
// DIM is the width of a head. A row of `qkv` has queries, keys and values side by side; rows are `stride` elements apart.

#define PAD ((DIM + 15) / 16 * 16) // width of a head, rounded up to whole fragments
#define STEPS (PAD / 16)
#define ROWS 64    // queries per tile: 16 per warp
#define BLOCK 64   // keys per step
#define SPREAD 8   // padding of rows in shared memory, which avoids bank conflicts

struct Shape { int queries, keys, stride, key_at, value_at, window; float scale, cap; };

// A tile of queries, with the keys they attend to: rows of the prompt, then rows of their own part from its first row on.
struct QueryTile { u32 first, count, own, prompt, prompt_len; };
// A tile of keys, and the end of the rows that may attend to them.
struct KeyTile { u32 first, count, end; };

// Row of the v-th key that a tile's queries attend to; v is the key's position.
INLINE u32 key_row(const QueryTile& t, u32 v) { return v < t.prompt_len ? t.prompt + v : t.own + (v - t.prompt_len); }

// Loads `count` rows of a head into shared memory, and zeros up to `rows` rows: to `to` row by row, and to `transposed` column
// by column, each unless it is null.
template <typename F>
INLINE void fetch(narrow* to, narrow* transposed, int rows, int count, const narrow* from, F at) {
    for (int i = threadIdx.x; i < rows * PAD; i += blockDim.x) {
        int r = i / PAD, c = i % PAD;
        narrow x = 0;
        if (r < count && c < DIM) x = from[at(r) + c];
        if (to) to[r * (PAD + SPREAD) + c] = x;
        if (transposed) transposed[c * (rows + SPREAD) + r] = x;
    }
}

INLINE Floats pair_at(const float* p) { return {p[0], p[1]}; }
INLINE u32 pair_at(const bf16* p) { return *(const u32*)p; }

// The fragment of A of 16 rows and 16 columns, from (row, column) on.
INLINE void fragment_a(Pair a[4], const narrow* m, int stride, int row, int column) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const narrow* p = m + (row + g) * stride + column + 2 * t;
    a[0] = pair_at(p);
    a[1] = pair_at(p + 8 * stride);
    a[2] = pair_at(p + 8);
    a[3] = pair_at(p + 8 * stride + 8);
}
// The fragment of B whose 8 columns are rows of `m`, from (row, column) on.
INLINE void fragment_b(Pair b[2], const narrow* m, int stride, int row, int column) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const narrow* p = m + (row + g) * stride + column + 2 * t;
    b[0] = pair_at(p);
    b[1] = pair_at(p + 8);
}
// Two neighbouring fragments of a result, converted to a fragment of A.
INLINE void fragment_c(Pair a[4], const float left[4], const float right[4]) {
    pair_of(&a[0], left[0], left[1]);
    pair_of(&a[1], left[2], left[3]);
    pair_of(&a[2], right[0], right[1]);
    pair_of(&a[3], right[2], right[3]);
}

INLINE bool attends(int query, int key, int window) { return key <= query && (window <= 0 || query - key < window); }

// One block of four warps per tile of queries and query head.
KERNEL attention(const narrow* qkv, const QueryTile* tiles, Shape s, narrow* out, float* lse) {
    DYNAMIC_SHARED(narrow, keys);
    narrow* values = keys + BLOCK * (PAD + SPREAD); // transposed: PAD x (BLOCK + SPREAD)
    QueryTile tile = tiles[blockIdx.x];
    int head = blockIdx.y, key_head = head / (s.queries / s.keys);
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    fetch(keys, (narrow*)0, ROWS, tile.count, qkv, [=](int r) { return (size_t)(tile.first + r) * s.stride + head * DIM; });
    __syncthreads();
    Pair q[STEPS][4];
    UNROLL for (int k = 0; k < STEPS; k++) fragment_a(q[k], keys, PAD + SPREAD, warp * 16, k * 16);
    float o[2 * STEPS][4] = {}, top[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, total[2] = {};
    int first_position = tile.prompt_len + tile.first - tile.own;
    int seen = first_position + tile.count;
    int begin = s.window > 0 ? max(0, first_position - s.window + 1) / BLOCK * BLOCK : 0;
    for (int block = begin; block < seen; block += BLOCK) {
        int count = min(BLOCK, seen - block);
        __syncthreads();
        fetch(keys, (narrow*)0, BLOCK, count, qkv,
              [=](int r) { return (size_t)key_row(tile, block + r) * s.stride + s.key_at + key_head * DIM; });
        fetch((narrow*)0, values, BLOCK, count, qkv,
              [=](int r) { return (size_t)key_row(tile, block + r) * s.stride + s.value_at + key_head * DIM; });
        __syncthreads();
        float p[BLOCK / 8][4] = {};
        UNROLL for (int n = 0; n < BLOCK / 8; n++)
            UNROLL for (int k = 0; k < STEPS; k++) {
                Pair b[2];
                fragment_b(b, keys, PAD + SPREAD, n * 8, k * 16);
                mma(p[n], q[k], b);
            }
        float most[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
        UNROLL for (int n = 0; n < BLOCK / 8; n++)
            UNROLL for (int i = 0; i < 4; i++) {
                int query = first_position + warp * 16 + g + i / 2 * 8, key = block + n * 8 + 2 * t + i % 2;
                p[n][i] = key < seen && attends(query, key, s.window) ? softcapped(p[n][i] * s.scale, s.cap) : NEGATIVE_INFINITY;
                most[i / 2] = fmaxf(most[i / 2], p[n][i]);
            }
        float shrink[2];
        UNROLL for (int h = 0; h < 2; h++) {
            most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 1));
            most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 2));
            float now = fmaxf(top[h], most[h]);
            // A row without any key so far has no sum to rescale.
            shrink[h] = top[h] == NEGATIVE_INFINITY ? 0.f : expf(top[h] - now);
            top[h] = now;
            total[h] *= shrink[h];
        }
        UNROLL for (int n = 0; n < BLOCK / 8; n++)
            UNROLL for (int i = 0; i < 4; i++) {
                p[n][i] = p[n][i] == NEGATIVE_INFINITY ? 0.f : expf(p[n][i] - top[i / 2]);
                total[i / 2] += p[n][i];
            }
        UNROLL for (int d = 0; d < 2 * STEPS; d++) {
            UNROLL for (int i = 0; i < 4; i++) o[d][i] *= shrink[i / 2];
            UNROLL for (int k = 0; k < BLOCK / 16; k++) {
                Pair a[4], b[2];
                fragment_c(a, p[2 * k], p[2 * k + 1]);
                fragment_b(b, values, BLOCK + SPREAD, d * 8, k * 16);
                mma(o[d], a, b);
            }
        }
    }
    UNROLL for (int h = 0; h < 2; h++) {
        total[h] += __shfl_xor_sync(0xffffffffu, total[h], 1);
        total[h] += __shfl_xor_sync(0xffffffffu, total[h], 2);
        int r = warp * 16 + g + h * 8;
        if (r >= (int)tile.count) continue;
        size_t row = tile.first + r;
        if (t == 0) lse[row * s.queries + head] = top[h] + logf(total[h]);
        UNROLL for (int d = 0; d < 2 * STEPS; d++)
            UNROLL for (int i = 0; i < 2; i++) {
                int c = d * 8 + 2 * t + i;
                if (c < DIM) store(out + (row * s.queries + head) * DIM + c, o[d][2 * h + i] / total[h]);
            }
    }
}

// For each row and head, the sum of grad * out, which the gradient of every score of the row needs. One warp per row and head.
KERNEL attention_delta(const narrow* out, const narrow* grad, size_t n, float* delta) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (i >= n) return;
    float sum = 0.f;
    for (int c = threadIdx.x % 32; c < DIM; c += 32) sum += load(out + i * DIM + c) * load(grad + i * DIM + c);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) delta[i] = sum;
}

// Probability of a score, and the derivative of the scaled, softcapped score with respect to the raw score.
INLINE float probability(float raw, float lse, const Shape& s, float* slope) {
    float y = softcapped(raw * s.scale, s.cap);
    *slope = s.scale * softcap_slope(y, s.cap);
    return expf(y - lse);
}

// Gradient of the queries. One block per tile of queries and query head.
KERNEL attention_queries(
    const narrow* qkv, const narrow* grad, const float* lse, const float* delta, const QueryTile* tiles, Shape s, narrow* d_qkv) {
    DYNAMIC_SHARED(narrow, keys);
    narrow* values = keys + BLOCK * (PAD + SPREAD);
    narrow* keys_transposed = values + BLOCK * (PAD + SPREAD); // PAD x (BLOCK + SPREAD)
    QueryTile tile = tiles[blockIdx.x];
    int head = blockIdx.y, key_head = head / (s.queries / s.keys);
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    fetch(keys, (narrow*)0, ROWS, tile.count, qkv, [=](int r) { return (size_t)(tile.first + r) * s.stride + head * DIM; });
    fetch(values, (narrow*)0, ROWS, tile.count, grad,
          [=](int r) { return ((size_t)(tile.first + r) * s.queries + head) * DIM; });
    __syncthreads();
    Pair q[STEPS][4], dout[STEPS][4];
    UNROLL for (int k = 0; k < STEPS; k++) {
        fragment_a(q[k], keys, PAD + SPREAD, warp * 16, k * 16);
        fragment_a(dout[k], values, PAD + SPREAD, warp * 16, k * 16);
    }
    float l[2] = {}, row_delta[2] = {};
    UNROLL for (int h = 0; h < 2; h++) {
        int r = warp * 16 + g + h * 8;
        if (r < (int)tile.count) {
            l[h] = lse[(size_t)(tile.first + r) * s.queries + head];
            row_delta[h] = delta[(size_t)(tile.first + r) * s.queries + head];
        }
    }
    float dq[2 * STEPS][4] = {};
    int first_position = tile.prompt_len + tile.first - tile.own;
    int seen = first_position + tile.count;
    int begin = s.window > 0 ? max(0, first_position - s.window + 1) / BLOCK * BLOCK : 0;
    for (int block = begin; block < seen; block += BLOCK) {
        int count = min(BLOCK, seen - block);
        __syncthreads();
        fetch(keys, keys_transposed, BLOCK, count, qkv,
              [=](int r) { return (size_t)key_row(tile, block + r) * s.stride + s.key_at + key_head * DIM; });
        fetch(values, (narrow*)0, BLOCK, count, qkv,
              [=](int r) { return (size_t)key_row(tile, block + r) * s.stride + s.value_at + key_head * DIM; });
        __syncthreads();
        float ds[BLOCK / 8][4];
        UNROLL for (int n = 0; n < BLOCK / 8; n++) {
            float raw[4] = {}, dp[4] = {};
            UNROLL for (int k = 0; k < STEPS; k++) {
                Pair b[2];
                fragment_b(b, keys, PAD + SPREAD, n * 8, k * 16);
                mma(raw, q[k], b);
                fragment_b(b, values, PAD + SPREAD, n * 8, k * 16);
                mma(dp, dout[k], b);
            }
            UNROLL for (int i = 0; i < 4; i++) {
                int r = warp * 16 + g + i / 2 * 8, key = block + n * 8 + 2 * t + i % 2;
                float slope, p = probability(raw[i], l[i / 2], s, &slope);
                bool on = r < (int)tile.count && key < seen && attends(first_position + r, key, s.window);
                ds[n][i] = on ? p * (dp[i] - row_delta[i / 2]) * slope : 0.f;
            }
        }
        UNROLL for (int d = 0; d < 2 * STEPS; d++)
            UNROLL for (int k = 0; k < BLOCK / 16; k++) {
                Pair a[4], b[2];
                fragment_c(a, ds[2 * k], ds[2 * k + 1]);
                fragment_b(b, keys_transposed, BLOCK + SPREAD, d * 8, k * 16);
                mma(dq[d], a, b);
            }
    }
    UNROLL for (int h = 0; h < 2; h++) {
        int r = warp * 16 + g + h * 8;
        if (r >= (int)tile.count) continue;
        UNROLL for (int d = 0; d < 2 * STEPS; d++)
            UNROLL for (int i = 0; i < 2; i++) {
                int c = d * 8 + 2 * t + i;
                if (c < DIM) store(d_qkv + (size_t)(tile.first + r) * s.stride + head * DIM + c, dq[d][2 * h + i]);
            }
    }
}

// Gradients of keys and values. One block per tile of keys and key head, which reads 32 queries at a time, head by head.
#define QUERIES 32
KERNEL attention_keys(
    const narrow* qkv, const narrow* grad, const float* lse, const float* delta, const u32* positions, const KeyTile* tiles,
    Shape s, narrow* d_qkv) {
    DYNAMIC_SHARED(narrow, rows);
    narrow* douts = rows + ROWS * (PAD + SPREAD);
    narrow* rows_transposed = douts + ROWS * (PAD + SPREAD); // PAD x (QUERIES + SPREAD), as is the next
    narrow* douts_transposed = rows_transposed + PAD * (QUERIES + SPREAD);
    KeyTile tile = tiles[blockIdx.x];
    int key_head = blockIdx.y, group = s.queries / s.keys;
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    auto part = [=](int at) {
        return [=](int r) { return (size_t)(tile.first + r) * s.stride + at + key_head * DIM; };
    };
    fetch(rows, (narrow*)0, ROWS, tile.count, qkv, part(s.key_at));
    fetch(douts, (narrow*)0, ROWS, tile.count, qkv, part(s.value_at));
    __syncthreads();
    Pair keys[STEPS][4], values[STEPS][4];
    UNROLL for (int k = 0; k < STEPS; k++) {
        fragment_a(keys[k], rows, PAD + SPREAD, warp * 16, k * 16);
        fragment_a(values[k], douts, PAD + SPREAD, warp * 16, k * 16);
    }
    int position[2] = {};
    UNROLL for (int h = 0; h < 2; h++) {
        int r = warp * 16 + g + h * 8;
        if (r < (int)tile.count) position[h] = positions[tile.first + r];
    }
    float dk[2 * STEPS][4] = {}, dv[2 * STEPS][4] = {};
    for (int head = key_head * group; head < (key_head + 1) * group; head++)
        for (u32 first = tile.first; first < tile.end; first += QUERIES) {
            int count = min((u32)QUERIES, tile.end - first);
            __syncthreads();
            fetch(rows, rows_transposed, QUERIES, count, qkv, [=](int r) { return (size_t)(first + r) * s.stride + head * DIM; });
            fetch(douts, douts_transposed, QUERIES, count, grad,
                  [=](int r) { return ((size_t)(first + r) * s.queries + head) * DIM; });
            __syncthreads();
            float p[QUERIES / 8][4], ds[QUERIES / 8][4];
            UNROLL for (int n = 0; n < QUERIES / 8; n++) {
                float raw[4] = {}, dp[4] = {};
                UNROLL for (int k = 0; k < STEPS; k++) {
                    Pair b[2];
                    fragment_b(b, rows, PAD + SPREAD, n * 8, k * 16);
                    mma(raw, keys[k], b);
                    fragment_b(b, douts, PAD + SPREAD, n * 8, k * 16);
                    mma(dp, values[k], b);
                }
                UNROLL for (int i = 0; i < 4; i++) {
                    int r = n * 8 + 2 * t + i % 2;
                    size_t row = first + r, at = row * s.queries + head;
                    bool on = r < count && warp * 16 + g + i / 2 * 8 < (int)tile.count &&
                              attends(positions[row], position[i / 2], s.window);
                    float slope, y = on ? probability(raw[i], lse[at], s, &slope) : 0.f;
                    p[n][i] = y;
                    ds[n][i] = on ? y * (dp[i] - delta[at]) * slope : 0.f;
                }
            }
            UNROLL for (int d = 0; d < 2 * STEPS; d++)
                UNROLL for (int k = 0; k < QUERIES / 16; k++) {
                    Pair a[4], b[2];
                    fragment_c(a, p[2 * k], p[2 * k + 1]);
                    fragment_b(b, douts_transposed, QUERIES + SPREAD, d * 8, k * 16);
                    mma(dv[d], a, b);
                    fragment_c(a, ds[2 * k], ds[2 * k + 1]);
                    fragment_b(b, rows_transposed, QUERIES + SPREAD, d * 8, k * 16);
                    mma(dk[d], a, b);
                }
        }
    UNROLL for (int h = 0; h < 2; h++) {
        int r = warp * 16 + g + h * 8;
        if (r >= (int)tile.count) continue;
        narrow* row = d_qkv + (size_t)(tile.first + r) * s.stride + key_head * DIM;
        UNROLL for (int d = 0; d < 2 * STEPS; d++)
            UNROLL for (int i = 0; i < 2; i++) {
                int c = d * 8 + 2 * t + i;
                if (c >= DIM) continue;
                store(row + s.key_at + c, dk[d][2 * h + i]);
                store(row + s.value_at + c, dv[d][2 * h + i]);
            }
    }
}
