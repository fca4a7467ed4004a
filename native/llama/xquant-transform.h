/* xquant-transform.h: keys in coordinates of the plan's own, one matrix M for each layer and KV head.
 *
 *     k' = M k        q' = M^-T q        q' . k' = q . k
 *
 * Calibration chooses M so that errors of all channels of k' weigh the same (xquant_gguf/transforms.py).  Attention
 * sees k' and q' and knows nothing of it.  M and M^-T are F16 [d][d][KV head]; a layer's codes are its own then.
 */
#pragma once

#include "ggml.h"

#include <cstdint>
#include <vector>

namespace xquant {

/* Both matrices of a layer as tensors of the cache; null: keys are as they came. */
struct key_transform {
    ggml_tensor *keys, *queries;
};

/* M^-T of each head: weight, out [n_head][d][d].  False: a matrix has no inverse, or not in F16's range. */
bool inverse_transposed(const std::vector<float> &weight, int64_t n_head, int64_t d, std::vector<float> &out);

/* x F32 [d, head, token] times the matrix of each head's KV head: a view of [d, token, head]. */
ggml_tensor *times_matrix(ggml_context *ctx, ggml_tensor *matrix, ggml_tensor *x);

} // namespace xquant
