/* attend.cuh: what the attention kernels share: the split over pages and the place of a state. */
#pragma once

#include "alibi.h"
#include "xquant_cuda.h"

namespace xq {

struct range {
    int begin, end;
};

__device__ inline range pages_of_part(const xq_cuda_attend_args &a, int part) {
    const int length = (a.n_kv_pages + a.n_parts - 1) / a.n_parts;
    const int begin = min(part * length, a.n_kv_pages);
    return {begin, min(begin + length, a.n_kv_pages)};
}

/* Stream of the cache that the nth of q is. */
__device__ inline int stream_of(const xq_cuda_attend_args &a, int nth) {
    return (a.first_stream ? *a.first_stream : 0) + nth;
}

__host__ __device__ inline int state_width(const xq_cuda_layer &l) {
    return (l.mapped ? 3 : 2) * l.e + 2;
}

/* The state of one row: maximum, sum of p, then sums over values: sealed, open, mapped: those of the source. */
__device__ inline float *state_of(const xq_cuda_layer &l, const xq_cuda_attend_args &a, int part, int token, int head) {
    const int64_t row = ((int64_t)part * a.n_streams * a.n_tokens + token) * a.n_head + head;
    return a.partial + row * state_width(l);
}

} // namespace xq
