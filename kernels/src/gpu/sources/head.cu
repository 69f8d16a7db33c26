// The head, after the final norm: log-probabilities of target tokens, entropies, and scores.

// For each row of logits, one block: the log-sum-exp of logits * scale, the target's log-probability and, if `entropy` is not
// null, the entropy -sum(p log p).
KERNEL logprobs(
    const float* logits, int vocab, const u32* targets, float scale, float cap, float* logprob, float* lse, float* entropy) {
    const float* x = logits + (size_t)blockIdx.x * vocab;
    float top = NEGATIVE_INFINITY;
    for (int c = threadIdx.x; c < vocab; c += blockDim.x) top = fmaxf(top, softcapped(x[c], cap) * scale);
    top = block_max(top);
    float sum = 0.f, mean = 0.f;
    for (int c = threadIdx.x; c < vocab; c += blockDim.x) {
        float log = softcapped(x[c], cap) * scale - top, e = expf(log);
        sum += e;
        mean += e * log;
    }
    sum = block_sum(sum);
    mean = block_sum(mean);
    if (threadIdx.x == 0) {
        float l = top + logf(sum);
        lse[blockIdx.x] = l;
        logprob[blockIdx.x] = softcapped(x[targets[blockIdx.x]], cap) * scale - l;
        if (entropy) entropy[blockIdx.x] = logf(sum) - mean / sum;
    }
}

// Gradient of grad * logprob(target) + d_entropy * entropy with respect to the logits.
KERNEL logprobs_back(
    const float* logits, int vocab, const u32* targets, float scale, float cap, const float* lse, const float* grad,
    const float* entropy, const float* d_entropy, narrow* out) {
    size_t row = blockIdx.x;
    float l = lse[row], g = grad[row], h = entropy ? entropy[row] : 0.f, dh = entropy ? d_entropy[row] : 0.f;
    for (int c = threadIdx.x; c < vocab; c += blockDim.x) {
        float y = softcapped(logits[row * vocab + c], cap), log = y * scale - l;
        float d = -expf(log) * ((log + h) * dh + g) + ((u32)c == targets[row] ? g : 0.f);
        store(out + row * vocab + c, d * scale * softcap_slope(y, cap));
    }
}

// Scores: the dot product of each row with the head's weight. One block per row.
KERNEL score(const narrow* x, const float* w, int width, float* out) {
    float sum = 0.f;
    for (int c = threadIdx.x; c < width; c += blockDim.x) sum += load(x + (size_t)blockIdx.x * width + c) * w[c];
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
// Gradient of the rows, given that of the scores.
KERNEL score_back(const float* grad, const float* w, int width, size_t n, float* out) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = grad[i / width] * w[i % width];
}
