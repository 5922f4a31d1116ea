// Whole blocks of a transformer, binary throughout. Both add to x (batch, tokens, width) what they compute, image by image, so that what lies
// between stays in the cache. Of the tokens only the first `kept` are wanted: what follows attention is not computed of others.
#pragma once
#include "kernels.h"

namespace LOWBIT_ISA {

// `plain`, with static thresholds: between the two sums of floats there are bits only.
struct PlainBlock {
    const float *norm1_weight, *norm1_bias, *norm1_threshold;
    const uint64_t* qkv_weight;
    const int32_t *qkv_low, *qkv_high, *context_low, *context_high;
    const uint64_t* proj_weight;
    const float *proj_scale, *proj_bias, *norm2_weight, *norm2_bias, *norm2_threshold;
    const uint64_t* fc1_weight;
    const int32_t *fc1_low, *fc1_high;
    const uint64_t* fc2_weight;
    const float *fc2_scale, *fc2_bias;
    int64_t heads, dim, hidden;  // dim is the width of a head, a multiple of 64
    float eps, logit_scale, map_scale;
};

KERNEL(plain_block)(const PlainBlock* p, long batch, long tokens, long kept, float* x) {
    const long width = p->heads * p->dim, wide = p->hidden > 3 * width ? p->hidden : 3 * width;
    uint64_t* narrow_bits = (uint64_t*)scratch(lowbit::NARROW_BITS, 8 * tokens * words_of(width));
    uint64_t* wide_bits = (uint64_t*)scratch(lowbit::WIDE_BITS, 8 * tokens * words_of(wide));
    for (long image = 0; image < batch; image++, x += tokens * width) {
        JOINED(LOWBIT_ISA, norm_sign_pack)(x, p->norm1_weight, p->norm1_bias, p->eps, p->norm1_threshold, 1, tokens, width, 1, narrow_bits);
        JOINED(LOWBIT_ISA, binary_linear_bits)(narrow_bits, p->qkv_weight, p->qkv_low, p->qkv_high, tokens, 3 * width, width, wide_bits);
        JOINED(LOWBIT_ISA, binary_attention_bits)
        (wide_bits, p->context_low, p->context_high, p->logit_scale, p->map_scale, 1, tokens, p->heads, p->dim, narrow_bits);
        JOINED(LOWBIT_ISA, binary_linear)(narrow_bits, p->proj_weight, p->proj_scale, p->proj_bias, x, kept, width, width, x);
        JOINED(LOWBIT_ISA, norm_sign_pack)(x, p->norm2_weight, p->norm2_bias, p->eps, p->norm2_threshold, 1, kept, width, 1, narrow_bits);
        JOINED(LOWBIT_ISA, binary_linear_bits)(narrow_bits, p->fc1_weight, p->fc1_low, p->fc1_high, kept, p->hidden, width, wide_bits);
        JOINED(LOWBIT_ISA, binary_linear)(wide_bits, p->fc2_weight, p->fc2_scale, p->fc2_bias, x, kept, width, p->hidden, x);
    }
}

// A layer, the signs of its input, and its tail where it is a `react` layer. Null where absent: gain, bias, the five parts of the tail.
struct BinaryLayer {
    const float *threshold, *gain;
    const uint64_t* weight;
    const float *scale, *bias, *norm_weight, *norm_bias, *before, *slope, *after;
    int64_t inputs, outputs;
};

// Any binary block, with floats between its layers. Null where absent: the gain of vectors (query, key, value), the norm of the context.
struct BinaryBlock {
    const float *norm1_weight, *norm1_bias, *vector_threshold, *vector_gain, *context_weight, *context_bias, *norm2_weight, *norm2_bias;
    BinaryLayer qkv, proj, fc1, fc2;
    int64_t heads;
    float eps, react_eps, logit_scale, map_scale;
};

// Output of a layer for x (tokens, inputs), plus residual where there is one; `between` holds tokens x outputs, and may be `to`.
INLINE void layer(const BinaryLayer& p, float react_eps, const float* x, long tokens, const float* residual, float* between, float* to) {
    const long n = p.outputs, k = p.inputs;
    uint64_t* bits = (uint64_t*)scratch(lowbit::WIDE_BITS, 8 * tokens * words_of(k));
    JOINED(LOWBIT_ISA, sign_pack)(x, p.threshold, p.gain, 1, tokens, k, 1, bits);
    if (!p.norm_weight) return JOINED(LOWBIT_ISA, binary_linear)(bits, p.weight, p.scale, p.bias, residual, tokens, n, k, to);
    JOINED(LOWBIT_ISA, binary_linear)(bits, p.weight, p.scale, p.bias, nullptr, tokens, n, k, between);
    JOINED(LOWBIT_ISA, react)(between, x, p.norm_weight, p.norm_bias, react_eps, p.before, p.slope, p.after, residual, tokens, n, k, to);
}

// context = norm(context) + query + key + value, head by head.
INLINE void carry_vectors(const BinaryBlock* p, const float* qkv, long tokens, long width, float* context) {
    const long dim = width / p->heads;
    parallel(tokens, 1, [=](long begin, long end) {
        for (long at = begin * width; at < end * width; at += dim) {
            const float* vectors = qkv + at / width * 3 * width + at % width;
            const Moments m = moments(context + at, dim, p->react_eps);
            sixteens(dim, [&](long i, long n) {
                const Floats z = normalized(load(context + at + i, n), m, load(p->context_weight + i, n), load(p->context_bias + i, n));
                store(context + at + i, z + load(vectors + i, n) + load(vectors + width + i, n) + load(vectors + 2 * width + i, n), n);
            });
        }
    });
}

KERNEL(binary_block)(const BinaryBlock* p, long batch, long tokens, long kept, float* x) {
    if (p->proj.gain || p->fc1.gain || p->fc2.gain) kept = tokens;  // their thresholds follow all tokens
    const long width = p->proj.outputs, hidden = p->fc1.outputs;
    float* narrow = (float*)scratch(lowbit::NARROW_FLOATS, 4 * 2 * tokens * width);
    float *normed = narrow, *context = narrow + tokens * width;
    float* wide = (float*)scratch(lowbit::WIDE_FLOATS, 4 * tokens * (hidden > 3 * width ? hidden : 3 * width));
    float* moved = (float*)scratch(lowbit::VECTORS, 4 * 3 * width);
    for (long image = 0; image < batch; image++, x += tokens * width) {
        JOINED(LOWBIT_ISA, layer_norm)(x, p->norm1_weight, p->norm1_bias, p->eps, tokens, width, normed);
        layer(p->qkv, p->react_eps, normed, tokens, nullptr, wide, wide);
        if (p->vector_gain) moved_row(wide, tokens, p->vector_threshold, p->vector_gain, 3 * width, moved);
        JOINED(LOWBIT_ISA, binary_attention)
        (wide, p->vector_gain ? moved : p->vector_threshold, p->logit_scale, p->map_scale, 1, tokens, p->heads, width / p->heads, 1, context);
        if (p->context_weight) carry_vectors(p, wide, tokens, width, context);
        layer(p->proj, p->react_eps, context, kept, x, normed, x);
        JOINED(LOWBIT_ISA, layer_norm)(x, p->norm2_weight, p->norm2_bias, p->eps, kept, width, normed);
        layer(p->fc1, p->react_eps, normed, kept, nullptr, wide, wide);
        if (!p->fc1.norm_weight) JOINED(LOWBIT_ISA, gelu)(wide, kept * hidden, wide);
        layer(p->fc2, p->react_eps, wide, kept, x, normed, x);
    }
}

}  // namespace LOWBIT_ISA
