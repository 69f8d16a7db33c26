// Norms, rotary positions, activations, embeddings, and sums over rows.

// Vectors of `dim` elements inside rows: vector i is head i % heads of row i / heads. A norm over whole rows has one head, as
// wide as the row.
struct Place { int heads, stride, at, dim; };
INLINE size_t place(Place p, int i) { return (size_t)(i / p.heads) * p.stride + p.at + (i % p.heads) * p.dim; }

// Mean (0 for RMSNorm) and inverse standard deviation of a vector, computed by all threads of a block.
template <typename X>
INLINE void moments(const X* x, int dim, float eps, int layer, float* mean, float* inverse) {
    float m = 0.f, s = 0.f;
    if (layer) {
        for (int c = threadIdx.x; c < dim; c += blockDim.x) m += load(x + c);
        m = block_sum(m) / dim;
    }
    for (int c = threadIdx.x; c < dim; c += blockDim.x) {
        float d = load(x + c) - m;
        s += d * d;
    }
    *mean = m;
    *inverse = 1.f / sqrtf(block_sum(s) / dim + eps);
}

// One block per vector; `out` has the layout of `x`.
template <typename X, typename Y>
INLINE void norm_forward(const X* x, Place p, const float* w, const float* b, float eps, int layer, Y* out) {
    size_t at = place(p, blockIdx.x);
    float mean, inverse;
    moments(x + at, p.dim, eps, layer, &mean, &inverse);
    for (int c = threadIdx.x; c < p.dim; c += blockDim.x)
        store(out + at + c, (load(x + at + c) - mean) * inverse * w[c] + (b ? b[c] : 0.f));
}
KERNEL norm_rows(const float* x, Place p, const float* w, const float* b, float eps, int layer, narrow* out) {
    norm_forward(x, p, w, b, eps, layer, out);
}
KERNEL norm_wide(const float* x, Place p, const float* w, const float* b, float eps, int layer, float* out) {
    norm_forward(x, p, w, b, eps, layer, out);
}
KERNEL head_norm(narrow* x, Place p, const float* w, float eps) {
    norm_forward(x, p, w, (const float*)0, eps, 0, x);
}

// Gradient of the norm's input, which is added to or replaces `d`. Writes mean and inverse standard deviation to `stats`.
template <typename X, typename G, typename D>
INLINE void norm_input(const X* x, const G* g, Place p, const float* w, float eps, int layer, int add, D* d, float* stats) {
    size_t at = place(p, blockIdx.x);
    float mean, inverse, plain = 0.f, along = 0.f;
    moments(x + at, p.dim, eps, layer, &mean, &inverse);
    for (int c = threadIdx.x; c < p.dim; c += blockDim.x) {
        float gw = load(g + at + c) * w[c];
        plain += gw;
        along += gw * (load(x + at + c) - mean);
    }
    plain = layer ? block_sum(plain) / p.dim : 0.f;
    along = block_sum(along) / p.dim * inverse * inverse;
    for (int c = threadIdx.x; c < p.dim; c += blockDim.x) {
        float y = inverse * (load(g + at + c) * w[c] - plain - (load(x + at + c) - mean) * along);
        store(d + at + c, add ? load(d + at + c) + y : y);
    }
    if (threadIdx.x == 0) {
        stats[2 * blockIdx.x] = mean;
        stats[2 * blockIdx.x + 1] = inverse;
    }
}
KERNEL norm_back(const float* x, const float* g, Place p, const float* w, float eps, int layer, float* d, float* stats) {
    norm_input(x, g, p, w, eps, layer, 1, d, stats);
}
KERNEL head_norm_stats(const narrow* x, Place p, float eps, float* stats) {
    float mean, inverse;
    moments(x + place(p, blockIdx.x), p.dim, eps, 0, &mean, &inverse);
    if (threadIdx.x == 0) {
        stats[2 * blockIdx.x] = mean;
        stats[2 * blockIdx.x + 1] = inverse;
    }
}
KERNEL head_norm_back(const narrow* x, narrow* g, Place p, const float* w, float eps, float* stats) {
    norm_input(x, g, p, w, eps, 0, 0, g, stats);
}

// Partial sums over chunks of vectors: part[chunk][column]. Blocks of 32 columns by 8 rows; grid of (columns / 32, chunks).
template <typename F>
INLINE void column_parts(int vectors, int chunk, int dim, float* part, F value) {
    __shared__ float sums[8][33];
    int c = blockIdx.x * 32 + threadIdx.x, first = blockIdx.y * chunk;
    int end = min(first + chunk, vectors);
    float sum = 0.f;
    if (c < dim)
        for (int i = first + threadIdx.y; i < end; i += 8) sum += value(i, c);
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < dim) {
        float total = 0.f;
        for (int j = 0; j < 8; j++) total += sums[j][threadIdx.x];
        part[(size_t)blockIdx.y * dim + c] = total;
    }
}
template <typename X, typename G>
INLINE void weight_parts(const X* x, const G* g, Place p, const float* stats, int vectors, int chunk, float* part) {
    column_parts(vectors, chunk, p.dim, part, [=](int i, int c) {
        size_t at = place(p, i) + c;
        return load(g + at) * (load(x + at) - stats[2 * i]) * stats[2 * i + 1];
    });
}
KERNEL norm_weight(const float* x, const float* g, Place p, const float* stats, int vectors, int chunk, float* part) {
    weight_parts(x, g, p, stats, vectors, chunk, part);
}
KERNEL head_norm_weight(
    const narrow* x, const narrow* g, Place p, const float* stats, int vectors, int chunk, float* part) {
    weight_parts(x, g, p, stats, vectors, chunk, part);
}
KERNEL column_sums(const narrow* g, Place p, int vectors, int chunk, float* part) {
    column_parts(vectors, chunk, p.dim, part, [=](int i, int c) { return load(g + place(p, i) + c); });
}
KERNEL column_sums_wide(const float* g, Place p, int vectors, int chunk, float* part) {
    column_parts(vectors, chunk, p.dim, part, [=](int i, int c) { return g[place(p, i) + c]; });
}
// Partial sums of rows times g[row]: the gradient of a score head's weight.
KERNEL score_weight(const narrow* x, const float* g, int vectors, int chunk, int dim, float* part) {
    column_parts(vectors, chunk, dim, part, [=](int i, int c) { return g[i] * load(x + (size_t)i * dim + c); });
}
// Adds the partial sums of each column to `sum`, in the order of the chunks.
KERNEL fold(const float* part, int chunks, int dim, float* sum) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= dim) return;
    float total = 0.f;
    for (int j = 0; j < chunks; j++) total += part[(size_t)j * dim + c];
    sum[c] += total;
}

// Rotates the first `heads` heads of each row by its position, or back if `sign` is -1. One thread per pair of elements.
KERNEL rotate(
    narrow* x, int rows, int stride, int heads, int half, const u32* positions, const float* cosines, const float* sines,
    float sign) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)rows * heads * half) return;
    int c = i % half, head = i / half % heads, row = i / half / heads;
    size_t angle = (size_t)positions[row] * half + c;
    narrow* p = x + (size_t)row * stride + head * 2 * half + c;
    float a = load(p), b = load(p + half), co = cosines[angle], si = sign * sines[angle];
    store(p, a * co - b * si);
    store(p + half, b * co + a * si);
}

// SiLU (kind 0) or GELU's tanh approximation (kind 1), and its derivative.
INLINE float act(int kind, float x, float* slope) {
    if (kind == 0) {
        float s = 1.f / (1.f + expf(-x));
        *slope = s * (1.f + x * (1.f - s));
        return x * s;
    }
    float t = tanhf(0.7978846f * x * (0.044715f * x * x + 1.f));
    *slope = 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * 0.7978846f * (3.f * 0.044715f * x * x + 1.f);
    return 0.5f * x * (1.f + t);
}
KERNEL activate(int kind, int gated, int width, size_t n, const narrow* in, narrow* out) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    size_t at = gated ? i / width * 2 * width + i % width : i;
    float slope, y = act(kind, load(in + at), &slope);
    store(out + i, gated ? y * load(in + at + width) : y);
}
KERNEL activate_back(int kind, int gated, int width, size_t n, narrow* in, const narrow* grad) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    size_t at = gated ? i / width * 2 * width + i % width : i;
    float slope, y = act(kind, load(in + at), &slope), g = load(grad + i);
    store(in + at, g * slope * (gated ? load(in + at + width) : 1.f));
    if (gated) store(in + at + width, g * y);
}

KERNEL add(float* x, const float* y, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += y[i];
}
// Conversions between f32 or bf16 and the element type of products.
KERNEL narrowed(const float* x, narrow* out, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) store(out + i, x[i]);
}
KERNEL narrowed_bf16(const bf16* x, narrow* out, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) store(out + i, load(x + i));
}
KERNEL widened(const narrow* x, float* out, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = load(x + i);
}
KERNEL add_bias(narrow* x, const float* bias, int width, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) store(x + i, load(x + i) + bias[i % width]);
}
KERNEL add_bias_wide(float* x, const float* bias, int width, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += bias[i % width];
}
// The transpose of a matrix [rows, columns], for weights that a model stores transposed (GPT-2).
KERNEL transposed(const float* x, int rows, int columns, narrow* out) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (size_t)rows * columns) store(out + i % columns * rows + i / columns, x[i]);
}

// Embeddings times `scale`, plus learned position embeddings if the model has them. One block per row.
template <typename W>
INLINE void embed_row(
    const W* table, const W* places, float scale, const u32* ids, const u32* positions, int width, float* out) {
    size_t row = blockIdx.x, at = (size_t)ids[row] * width, place = (size_t)positions[row] * width;
    for (int c = threadIdx.x; c < width; c += blockDim.x)
        out[row * width + c] = load(table + at + c) * scale + (places ? load(places + place + c) : 0.f);
}
KERNEL embed(
    const float* table, const float* places, float scale, const u32* ids, const u32* positions, int width, float* out) {
    embed_row(table, places, scale, ids, positions, width, out);
}
KERNEL embed_bf16(
    const bf16* table, const bf16* places, float scale, const u32* ids, const u32* positions, int width, float* out) {
    embed_row(table, places, scale, ids, positions, width, out);
}
KERNEL gather(const float* x, const u32* rows, int width, float* out) {
    size_t row = blockIdx.x, at = (size_t)rows[row] * width;
    for (int c = threadIdx.x; c < width; c += blockDim.x) out[row * width + c] = x[at + c];
}
// Adds rows of `x` to rows of `out`, one block per row of `out`: row targets[i] receives the rows
// order[starts[i]..starts[i + 1]], one after another, so that the sum does not depend on how threads are scheduled.
KERNEL add_rows(
    const float* x, const u32* targets, const u32* starts, const u32* order, float scale, int width, float* out) {
    size_t at = (size_t)targets[blockIdx.x] * width;
    u32 first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        float sum = out[at + c];
        for (u32 j = first; j < end; j++) sum += x[(size_t)order[j] * width + c] * scale;
        out[at + c] = sum;
    }
}
