// Samples the next token of each row. Temperature, top-k, top-p and min-p are as on the CPU, but by thresholds on the logits
// instead of sorting: tokens that tie with the last one kept are all kept. One block of 1,024 threads per row.

#define THREADS 1024
#define ENDS_MAX 16

struct Settings {
    u64 seed;
    float temperature, top_p, min_p, cap;
    int top_k, vocab, min_new, ends, steps;
    u32 end[ENDS_MAX];
};

// Philox4x32-10 (Salmon et al. 2011), as `random.rs`.
INLINE double uniform(u64 seed, u64 id, u64 position) {
    u32 c[4] = {(u32)position, (u32)(position >> 32), (u32)id, (u32)(id >> 32)}, k[2] = {(u32)seed, (u32)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        u64 a = (u64)c[0] * 0xD2511F53u, b = (u64)c[2] * 0xCD9E8D57u;
        u32 next[4] = {(u32)(b >> 32) ^ c[1] ^ k[0], (u32)b, (u32)(a >> 32) ^ c[3] ^ k[1], (u32)a};
        for (int i = 0; i < 4; i++) c[i] = next[i];
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    u64 bits = (u64)c[0] | (u64)c[1] << 32;
    return (double)(bits >> 11) / 9007199254740992.0;
}

// An order-preserving map from floats to unsigned integers, and its inverse.
INLINE u32 order(float x) {
    u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
INLINE float unorder(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The largest value such that all values at least as large have a total weight of `wanted` or more. Weights are integers, so
// their sums do not depend on the order. The value is found eight bits at a time.
template <typename V, typename W>
INLINE float threshold(int vocab, u64 wanted, V value, W weight) {
    __shared__ u64 bins[256];
    __shared__ u32 prefix_;
    __shared__ u64 above_;
    u32 prefix = 0;
    u64 above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        if (threadIdx.x < 256) bins[threadIdx.x] = 0;
        __syncthreads();
        for (int c = threadIdx.x; c < vocab; c += blockDim.x) {
            u32 key = order(value(c));
            if (shift == 24 || key >> (shift + 8) == prefix >> (shift + 8)) {
                u64 w = weight(c);
                if (w) atomicAdd(&bins[key >> shift & 255], w);
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int bin = 255;
            u64 sum = above;
            for (; bin > 0 && sum + bins[bin] < wanted; bin--) sum += bins[bin];
            prefix_ = prefix | (u32)bin << shift;
            above_ = sum;
        }
        __syncthreads();
        prefix = prefix_;
        above = above_;
    }
    return unorder(prefix);
}

// State of each row: the id of its random stream, the number of tokens drawn, the position of the next token, and whether it
// continues. The drawn tokens and their log-probabilities are written to [step][row].
KERNEL sample(
    const float* logits, Settings s, const u64* ids, u32* tokens, u32* positions, u32* drawn, u32* active, const u32* step,
    u32* drawn_tokens, float* drawn_logprobs) {
    __shared__ double sums[THREADS], parts[THREADS / 32];
    __shared__ u32 chosen;
    u32 row = blockIdx.x;
    size_t at = (size_t)*step * gridDim.x + row;
    if (!active[row]) return;
    const float* x = logits + (size_t)row * s.vocab;
    float scale = s.temperature > 0.f ? 1.f / s.temperature : 1.f;
    bool masked = (int)drawn[row] < s.min_new;
    // `raw`: softcapped logits. `free`: the same, without end tokens while fewer than `min_new` tokens were drawn.
    auto raw = [=](int c) { return softcapped(x[c], s.cap); };
    auto free = [=](int c) {
        if (masked)
            for (int i = 0; i < s.ends; i++)
                if (s.end[i] == (u32)c) return NEGATIVE_INFINITY;
        return softcapped(x[c], s.cap);
    };
    float top = NEGATIVE_INFINITY, free_top = NEGATIVE_INFINITY, sum = 0.f;
    for (int c = threadIdx.x; c < s.vocab; c += blockDim.x) {
        top = fmaxf(top, raw(c));
        free_top = fmaxf(free_top, free(c));
    }
    top = block_max(top);
    free_top = block_max(free_top);
    for (int c = threadIdx.x; c < s.vocab; c += blockDim.x) sum += expf((raw(c) - top) * scale);
    float lse = top * scale + logf(block_sum(sum));
    if (threadIdx.x == 0) chosen = s.vocab;
    __syncthreads();
    if (s.temperature == 0.f) {
        u32 first = s.vocab;
        for (int c = threadIdx.x; c < s.vocab && first == (u32)s.vocab; c += blockDim.x)
            if (free(c) == free_top) first = c;
        if (first < (u32)s.vocab) atomicMin(&chosen, first);
    } else {
        float least = NEGATIVE_INFINITY;
        if (s.top_k > 0 && s.top_k < s.vocab) least = threshold(s.vocab, (u64)s.top_k, free, [](int) { return (u64)1; });
        // Probabilities as integer multiples of 2^-40.
        auto weight = [=](int c) {
            float y = free(c);
            return y >= least && y > NEGATIVE_INFINITY ? (u64)((double)expf((y - free_top) * scale) * 1099511627776.0) : (u64)0;
        };
        if (s.top_p < 1.f) {
            // The total weight of all tokens.
            __shared__ u64 total;
            if (threadIdx.x == 0) total = 0;
            __syncthreads();
            u64 mine = 0;
            for (int c = threadIdx.x; c < s.vocab; c += blockDim.x) mine += weight(c);
            atomicAdd(&total, mine);
            __syncthreads();
            u64 wanted = (u64)((double)total * (double)s.top_p);
            least = fmaxf(least, threshold(s.vocab, wanted > 0 ? wanted : 1, free, weight));
        }
        if (s.min_p > 0.f) least = fmaxf(least, free_top + logf(s.min_p) / scale);
        // Cumulative probability in vocabulary order; each thread sums a contiguous range.
        int stretch = (s.vocab + THREADS - 1) / THREADS, from = min((int)threadIdx.x * stretch, s.vocab);
        int to = min(from + stretch, s.vocab);
        auto p = [=](int c) {
            float y = free(c);
            return y >= least && y > NEGATIVE_INFINITY ? (double)expf((y - free_top) * scale) : 0.0;
        };
        double mass = 0.0;
        for (int c = from; c < to; c++) mass += p(c);
        sums[threadIdx.x] = mass;
        __syncthreads();
        // Sums of 32 threads each, so that one thread has few to go through.
        if (threadIdx.x < THREADS / 32) {
            double part = 0.0;
            for (int i = 0; i < 32; i++) part += sums[threadIdx.x * 32 + i];
            parts[threadIdx.x] = part;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            double total = 0.0;
            for (int i = 0; i < THREADS / 32; i++) total += parts[i];
            double left = uniform(s.seed, ids[row], drawn[row]) * total;
            int part = 0;
            while (part + 1 < THREADS / 32 && left >= parts[part]) left -= parts[part++];
            int i = part * 32;
            while (i + 1 < THREADS && left >= sums[i]) left -= sums[i++];
            u32 last = s.vocab;
            for (int c = i * stretch; c < s.vocab; c++) {
                double y = p(c);
                if (y <= 0.0) continue;
                last = c;
                left -= y;
                if (left < 0.0) break;
            }
            // Rounding may put the draw past the last token.
            for (int c = s.vocab - 1; last == (u32)s.vocab && c >= 0; c--)
                if (p(c) > 0.0) last = c;
            chosen = last;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        bool end = false;
        for (int i = 0; i < s.ends; i++) end |= s.end[i] == chosen;
        drawn_tokens[at] = chosen;
        drawn_logprobs[at] = raw(chosen) * scale - lse;
        tokens[row] = chosen;
        drawn[row] += 1;
        positions[row] += 1;
        if (end || (int)drawn[row] >= s.steps) active[row] = 0;
    }
}

// Increments the step counter.
KERNEL next_step(u32* step) { *step += 1; }
