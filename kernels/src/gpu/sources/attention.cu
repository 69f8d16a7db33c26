// Causal grouped-query attention over packed sequences: on tensor cores in bf16, with the same fragments in f32 otherwise. Scores
// exist in registers only; the backward pass recomputes probabilities from the scores' log-sum-exp. While a tile is computed, the
// next one is loaded.
//
// DIM is the width of a head. A row of `qkv` has queries, keys and values side by side; rows are `stride` elements apart.

#define PAD ((DIM + 15) / 16 * 16) // width of a head, rounded up to whole fragments
#define STEPS (PAD / 16)
#define ROWS 64    // rows per tile: 16 per warp
#define BLOCK 64   // keys per step
#define THREADS 128
#define LINE (PAD + 8) // elements from a row to the next in shared memory; the padding avoids bank conflicts
static_assert(DIM % 2 == 0, "heads have an even width");
#define WIDE (16 / (int)sizeof(narrow)) // elements of a 16-byte access
// Tiles that are loaded ahead, the one in use included, where shared memory has room for them.
#define BUFFERS (PAD * sizeof(narrow) > 256 ? 1 : 2)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

struct Shape { int queries, keys, stride, key_at, value_at, window; float scale, cap; };

// A tile of queries, with the keys they attend to: rows of the prompt, then rows of their own part from its first row on.
struct QueryTile { u32 first, count, own, prompt, prompt_len; };
// A tile of keys, and the end of the rows that may attend to them.
struct KeyTile { u32 first, count, end; };

// Row of the v-th key that a tile's queries attend to; v is the key's position.
INLINE u32 key_row(const QueryTile& t, u32 v) { return v < t.prompt_len ? t.prompt + v : t.own + (v - t.prompt_len); }

// Starts to load `count` rows of a head into shared memory, and zeros up to N rows; at(r) is where row r begins in `from`.
template <int N, typename F> INLINE void fetch(narrow* to, int count, const narrow* from, F at) {
    if (DIM % WIDE == 0) {
        UNROLL for (int i = threadIdx.x; i < N * (PAD / WIDE); i += THREADS) {
            int r = i / (PAD / WIDE), c = i % (PAD / WIDE) * WIDE;
            bool on = r < count && c < DIM;
            copy_16(to + r * LINE + c, on ? from + at(r) + c : from, on);
        }
        return;
    }
    for (int i = threadIdx.x; i < N * PAD; i += THREADS) {
        int r = i / PAD, c = i % PAD;
        to[r * LINE + c] = r < count && c < DIM ? from[at(r) + c] : (narrow)0;
    }
}

INLINE bool attends(int query, int key, int window) { return key <= query && (window <= 0 || query - key < window); }

// One block of four warps per tile of queries and query head.
KERNEL attention(const narrow* qkv, const QueryTile* tiles, Shape s, narrow* out, float* lse) {
    DYNAMIC_SHARED(narrow, shared);
    QueryTile tile = tiles[blockIdx.x];
    int head = blockIdx.y, key_head = head / (s.queries / s.keys);
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int first_position = tile.prompt_len + tile.first - tile.own;
    int seen = first_position + tile.count;
    int begin = s.window > 0 ? max(0, first_position - s.window + 1) / BLOCK * BLOCK : 0;
    // Keys of buffer b, then its values.
    auto buffer = [=](int b) { return shared + b % BUFFERS * 2 * BLOCK * LINE; };
    auto load_keys = [=](int b, int block) {
        int count = min(BLOCK, seen - block);
        fetch<BLOCK>(buffer(b), count, qkv,
                     [=](int r) { return (size_t)key_row(tile, block + r) * s.stride + s.key_at + key_head * DIM; });
        fetch<BLOCK>(buffer(b) + BLOCK * LINE, count, qkv,
                     [=](int r) { return (size_t)key_row(tile, block + r) * s.stride + s.value_at + key_head * DIM; });
    };
    // The queries pass through the last buffer.
    fetch<ROWS>(buffer(BUFFERS - 1), tile.count, qkv,
                [=](int r) { return (size_t)(tile.first + r) * s.stride + head * DIM; });
    copies_end_group();
    if (BUFFERS > 1) load_keys(0, begin);
    copies_end_group();
    copies_wait<1>();
    __syncthreads();
    Pair q[STEPS][4];
    UNROLL for (int k = 0; k < STEPS; k++) fragment_a(q[k], buffer(BUFFERS - 1), LINE, warp * 16, k * 16);
    // Scores are in units of log 2.
    float o[2 * STEPS][4] = {}, top[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, total[2] = {};
    float scale = s.cap > 0.f ? s.scale : s.scale * LOG2E;
    int b = 0;
    for (int block = begin; block < seen; block += BLOCK, b++) {
        __syncthreads();
        if (BUFFERS == 1) load_keys(0, block);
        if (BUFFERS > 1 && block + BLOCK < seen) load_keys(b + 1, block + BLOCK);
        copies_end_group();
        copies_wait<BUFFERS - 1>();
        __syncthreads();
        narrow *keys = buffer(b), *values = keys + BLOCK * LINE;
        float p[BLOCK / 8][4] = {};
        UNROLL for (int n = 0; n < BLOCK / 8; n += 2)
            UNROLL for (int k = 0; k < STEPS; k++) {
                Pair x[2][2];
                fragments_b(x, keys, LINE, n * 8, k * 16);
                mma(p[n], q[k], x[0]);
                mma(p[n + 1], q[k], x[1]);
            }
        float most[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
        // Whether every query of the tile attends to every key of the block.
        bool inner = block + BLOCK - 1 <= first_position && (s.window <= 0 || seen - 1 - block < s.window);
        UNROLL for (int n = 0; n < BLOCK / 8; n++)
            UNROLL for (int i = 0; i < 4; i++) {
                float y = p[n][i] * scale;
                if (s.cap > 0.f) y = softcapped(y, s.cap) * LOG2E;
                if (!inner) {
                    int query = first_position + warp * 16 + g + i / 2 * 8, key = block + n * 8 + 2 * t + i % 2;
                    if (key >= seen || !attends(query, key, s.window)) y = NEGATIVE_INFINITY;
                }
                p[n][i] = y;
                most[i / 2] = fmaxf(most[i / 2], y);
            }
        float shrink[2], base[2];
        UNROLL for (int h = 0; h < 2; h++) {
            most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 1));
            most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 2));
            float now = fmaxf(top[h], most[h]);
            // A row without any key so far has no sum to rescale, and every score is minus infinity.
            base[h] = now == NEGATIVE_INFINITY ? 0.f : now;
            shrink[h] = exp2f(top[h] - base[h]);
            top[h] = now;
            total[h] *= shrink[h];
        }
        UNROLL for (int n = 0; n < BLOCK / 8; n++)
            UNROLL for (int i = 0; i < 4; i++) {
                p[n][i] = exp2f(p[n][i] - base[i / 2]);
                total[i / 2] += p[n][i];
            }
        UNROLL for (int d = 0; d < 2 * STEPS; d++)
            UNROLL for (int i = 0; i < 4; i++) o[d][i] *= shrink[i / 2];
        UNROLL for (int k = 0; k < BLOCK / 16; k++) {
            Pair a[4];
            fragment_c(a, p[2 * k], p[2 * k + 1]);
            UNROLL for (int d = 0; d < 2 * STEPS; d += 2) {
                Pair x[2][2];
                fragments_b_of_rows(x, values, LINE, k * 16, d * 8);
                mma(o[d], a, x[0]);
                mma(o[d + 1], a, x[1]);
            }
        }
    }
    UNROLL for (int h = 0; h < 2; h++) {
        total[h] += __shfl_xor_sync(0xffffffffu, total[h], 1);
        total[h] += __shfl_xor_sync(0xffffffffu, total[h], 2);
        int r = warp * 16 + g + h * 8;
        if (r >= (int)tile.count) continue;
        size_t row = tile.first + r;
        if (t == 0) lse[row * s.queries + head] = top[h] * LN2 + logf(total[h]);
        float share = 1.f / total[h];
        UNROLL for (int d = 0; d < 2 * STEPS; d++) {
            int c = d * 8 + 2 * t;
            if (c < DIM) store_pair(out + (row * s.queries + head) * DIM + c, o[d][2 * h] * share, o[d][2 * h + 1] * share);
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

// Probability of a score, and the derivative of the scaled, softcapped score with respect to the raw score. `lse` is in units of
// log 2.
INLINE float probability(float raw, float lse, const Shape& s, float* slope) {
    float y = softcapped(raw * s.scale, s.cap);
    *slope = s.scale * softcap_slope(y, s.cap);
    return exp2f(y * LOG2E - lse);
}

// Gradient of the queries. One block per tile of queries and query head.
KERNEL attention_queries(
    const narrow* qkv, const narrow* grad, const float* lse, const float* delta, const QueryTile* tiles, Shape s, narrow* d_qkv) {
    DYNAMIC_SHARED(narrow, shared);
    QueryTile tile = tiles[blockIdx.x];
    int head = blockIdx.y, key_head = head / (s.queries / s.keys);
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int first_position = tile.prompt_len + tile.first - tile.own;
    int seen = first_position + tile.count;
    int begin = s.window > 0 ? max(0, first_position - s.window + 1) / BLOCK * BLOCK : 0;
    auto buffer = [=](int b) { return shared + b % BUFFERS * 2 * BLOCK * LINE; };
    auto load_keys = [=](int b, int block) {
        int count = min(BLOCK, seen - block);
        fetch<BLOCK>(buffer(b), count, qkv,
                     [=](int r) { return (size_t)key_row(tile, block + r) * s.stride + s.key_at + key_head * DIM; });
        fetch<BLOCK>(buffer(b) + BLOCK * LINE, count, qkv,
                     [=](int r) { return (size_t)key_row(tile, block + r) * s.stride + s.value_at + key_head * DIM; });
    };
    fetch<ROWS>(buffer(BUFFERS - 1), tile.count, qkv,
                [=](int r) { return (size_t)(tile.first + r) * s.stride + head * DIM; });
    fetch<ROWS>(buffer(BUFFERS - 1) + BLOCK * LINE, tile.count, grad,
                [=](int r) { return ((size_t)(tile.first + r) * s.queries + head) * DIM; });
    copies_end_group();
    if (BUFFERS > 1) load_keys(0, begin);
    copies_end_group();
    copies_wait<1>();
    __syncthreads();
    Pair q[STEPS][4], dout[STEPS][4];
    UNROLL for (int k = 0; k < STEPS; k++) {
        fragment_a(q[k], buffer(BUFFERS - 1), LINE, warp * 16, k * 16);
        fragment_a(dout[k], buffer(BUFFERS - 1) + BLOCK * LINE, LINE, warp * 16, k * 16);
    }
    float l[2] = {}, row_delta[2] = {};
    UNROLL for (int h = 0; h < 2; h++) {
        int r = warp * 16 + g + h * 8;
        if (r < (int)tile.count) {
            l[h] = lse[(size_t)(tile.first + r) * s.queries + head] * LOG2E;
            row_delta[h] = delta[(size_t)(tile.first + r) * s.queries + head];
        }
    }
    float dq[2 * STEPS][4] = {};
    int b = 0;
    for (int block = begin; block < seen; block += BLOCK, b++) {
        __syncthreads();
        if (BUFFERS == 1) load_keys(0, block);
        if (BUFFERS > 1 && block + BLOCK < seen) load_keys(b + 1, block + BLOCK);
        copies_end_group();
        copies_wait<BUFFERS - 1>();
        __syncthreads();
        narrow *keys = buffer(b), *values = keys + BLOCK * LINE;
        bool inner = block + BLOCK - 1 <= first_position && tile.count == ROWS && (s.window <= 0 || seen - 1 - block < s.window);
        float ds[BLOCK / 8][4];
        UNROLL for (int n = 0; n < BLOCK / 8; n += 2) {
            float raw[2][4] = {}, dp[2][4] = {};
            UNROLL for (int k = 0; k < STEPS; k++) {
                Pair x[2][2];
                fragments_b(x, keys, LINE, n * 8, k * 16);
                mma(raw[0], q[k], x[0]);
                mma(raw[1], q[k], x[1]);
                fragments_b(x, values, LINE, n * 8, k * 16);
                mma(dp[0], dout[k], x[0]);
                mma(dp[1], dout[k], x[1]);
            }
            UNROLL for (int j = 0; j < 2; j++)
                UNROLL for (int i = 0; i < 4; i++) {
                    int r = warp * 16 + g + i / 2 * 8, key = block + (n + j) * 8 + 2 * t + i % 2;
                    float slope, p = probability(raw[j][i], l[i / 2], s, &slope);
                    bool on = inner || (r < (int)tile.count && key < seen && attends(first_position + r, key, s.window));
                    ds[n + j][i] = on ? p * (dp[j][i] - row_delta[i / 2]) * slope : 0.f;
                }
        }
        UNROLL for (int k = 0; k < BLOCK / 16; k++) {
            Pair a[4];
            fragment_c(a, ds[2 * k], ds[2 * k + 1]);
            UNROLL for (int d = 0; d < 2 * STEPS; d += 2) {
                Pair x[2][2];
                fragments_b_of_rows(x, keys, LINE, k * 16, d * 8);
                mma(dq[d], a, x[0]);
                mma(dq[d + 1], a, x[1]);
            }
        }
    }
    UNROLL for (int h = 0; h < 2; h++) {
        int r = warp * 16 + g + h * 8;
        if (r >= (int)tile.count) continue;
        UNROLL for (int d = 0; d < 2 * STEPS; d++) {
            int c = d * 8 + 2 * t;
            if (c < DIM)
                store_pair(d_qkv + (size_t)(tile.first + r) * s.stride + head * DIM + c, dq[d][2 * h], dq[d][2 * h + 1]);
        }
    }
}

// Gradients of keys and values. One block per tile of keys and key head, which reads QUERIES queries at a time, head by head.
#define QUERIES (PAD * sizeof(narrow) > 256 ? 16 : 32)
// Whether the fragments of keys and values stay in registers.
#define HELD (STEPS <= 4)
KERNEL attention_keys(
    const narrow* qkv, const narrow* grad, const float* lse, const float* delta, const u32* positions, const KeyTile* tiles,
    Shape s, narrow* d_qkv) {
    DYNAMIC_SHARED(narrow, shared);
    __shared__ float row_lse[2][32], row_delta[2][32];
    __shared__ u32 row_position[2][32];
    narrow *keys = shared, *values = keys + ROWS * LINE;
    KeyTile tile = tiles[blockIdx.x];
    int key_head = blockIdx.y, group = s.queries / s.keys;
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    // Queries of buffer b, then the gradients of their outputs.
    auto buffer = [=](int b) { return shared + (2 * ROWS + b % BUFFERS * 2 * QUERIES) * LINE; };
    int blocks = (tile.end - tile.first + QUERIES - 1) / QUERIES, steps = blocks * group;
    auto load_queries = [=](int step) {
        u32 first = tile.first + step % blocks * QUERIES;
        int head = key_head * group + step / blocks, count = min((u32)QUERIES, tile.end - first), b = step % BUFFERS;
        fetch<QUERIES>(buffer(step), count, qkv, [=](int r) { return (size_t)(first + r) * s.stride + head * DIM; });
        fetch<QUERIES>(buffer(step) + QUERIES * LINE, count, grad,
                       [=](int r) { return ((size_t)(first + r) * s.queries + head) * DIM; });
        int r = threadIdx.x % 32;
        bool on = r < count;
        size_t row = on ? first + r : first, at = row * s.queries + head;
        if (r < QUERIES) {
            if (warp == 0) copy_4(&row_lse[b][r], lse + at, on);
            if (warp == 1) copy_4(&row_delta[b][r], delta + at, on);
            if (warp == 2) copy_4(&row_position[b][r], positions + row, on);
        }
    };
    auto part = [=](int at) {
        return [=](int r) { return (size_t)(tile.first + r) * s.stride + at + key_head * DIM; };
    };
    fetch<ROWS>(keys, tile.count, qkv, part(s.key_at));
    fetch<ROWS>(values, tile.count, qkv, part(s.value_at));
    copies_end_group();
    if (BUFFERS > 1) load_queries(0);
    copies_end_group();
    copies_wait<1>();
    __syncthreads();
    Pair held_keys[HELD ? STEPS : 1][4], held_values[HELD ? STEPS : 1][4];
    if (HELD)
        UNROLL for (int k = 0; k < STEPS; k++) {
            fragment_a(held_keys[HELD ? k : 0], keys, LINE, warp * 16, k * 16);
            fragment_a(held_values[HELD ? k : 0], values, LINE, warp * 16, k * 16);
        }
    int position[2] = {};
    UNROLL for (int h = 0; h < 2; h++) {
        int r = warp * 16 + g + h * 8;
        if (r < (int)tile.count) position[h] = positions[tile.first + r];
    }
    float dk[2 * STEPS][4] = {}, dv[2 * STEPS][4] = {};
    for (int step = 0; step < steps; step++) {
        __syncthreads();
        if (BUFFERS == 1) load_queries(step);
        if (BUFFERS > 1 && step + 1 < steps) load_queries(step + 1);
        copies_end_group();
        copies_wait<BUFFERS - 1>();
        __syncthreads();
        narrow *rows = buffer(step), *douts = rows + QUERIES * LINE;
        int b = step % BUFFERS, count = min((u32)QUERIES, tile.end - tile.first - step % blocks * QUERIES);
        float p[QUERIES / 8][4], ds[QUERIES / 8][4];
        UNROLL for (int n = 0; n < QUERIES / 8; n += 2) {
            float raw[2][4] = {}, dp[2][4] = {};
            UNROLL for (int k = 0; k < STEPS; k++) {
                Pair a[4], x[2][2];
                if (!HELD) fragment_a(a, keys, LINE, warp * 16, k * 16);
                fragments_b(x, rows, LINE, n * 8, k * 16);
                mma(raw[0], HELD ? held_keys[HELD ? k : 0] : a, x[0]);
                mma(raw[1], HELD ? held_keys[HELD ? k : 0] : a, x[1]);
                if (!HELD) fragment_a(a, values, LINE, warp * 16, k * 16);
                fragments_b(x, douts, LINE, n * 8, k * 16);
                mma(dp[0], HELD ? held_values[HELD ? k : 0] : a, x[0]);
                mma(dp[1], HELD ? held_values[HELD ? k : 0] : a, x[1]);
            }
            UNROLL for (int j = 0; j < 2; j++)
                UNROLL for (int odd = 0; odd < 2; odd++) {
                    int r = (n + j) * 8 + 2 * t + odd, query = row_position[b][r];
                    float l = row_lse[b][r] * LOG2E, d = row_delta[b][r];
                    UNROLL for (int h = 0; h < 2; h++) {
                        int i = 2 * h + odd;
                        bool on = r < count && warp * 16 + g + h * 8 < (int)tile.count && attends(query, position[h], s.window);
                        float slope, y = probability(raw[j][i], l, s, &slope);
                        p[n + j][i] = on ? y : 0.f;
                        ds[n + j][i] = on ? y * (dp[j][i] - d) * slope : 0.f;
                    }
                }
        }
        UNROLL for (int k = 0; k < QUERIES / 16; k++) {
            Pair a[4], e[4];
            fragment_c(a, p[2 * k], p[2 * k + 1]);
            fragment_c(e, ds[2 * k], ds[2 * k + 1]);
            UNROLL for (int d = 0; d < 2 * STEPS; d += 2) {
                Pair x[2][2];
                fragments_b_of_rows(x, douts, LINE, k * 16, d * 8);
                mma(dv[d], a, x[0]);
                mma(dv[d + 1], a, x[1]);
                fragments_b_of_rows(x, rows, LINE, k * 16, d * 8);
                mma(dk[d], e, x[0]);
                mma(dk[d + 1], e, x[1]);
            }
        }
    }
    UNROLL for (int h = 0; h < 2; h++) {
        int r = warp * 16 + g + h * 8;
        if (r >= (int)tile.count) continue;
        narrow* row = d_qkv + (size_t)(tile.first + r) * s.stride + key_head * DIM;
        UNROLL for (int d = 0; d < 2 * STEPS; d++) {
            int c = d * 8 + 2 * t;
            if (c >= DIM) continue;
            store_pair(row + s.key_at + c, dk[d][2 * h], dk[d][2 * h + 1]);
            store_pair(row + s.value_at + c, dv[d][2 * h], dv[d][2 * h + 1]);
        }
    }
}
