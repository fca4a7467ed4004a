/* decode_shape.h: the blocks of the tensor-core attention for a layer on the device at hand. */
#pragma once

#include "launch.h"
#include "stage.cuh"

namespace xq {

/* Teams of warps of a block, buffers of sealed pages of each, warps that take open ones, where the buffers start, and
 * all of its dynamic shared memory. n_teams = 0: nothing fits. */
struct decode_shape {
    staged at;
    int n_teams, depth, n_open, buffers, shared;
};

/* One side of every KV head and stream: that of the first, and bytes from one to the next. */
struct side_views {
    side_view first;
    int64_t codes_head, param_head, window_head, codes_stream, param_stream, window_stream;

    __device__ side_view at(int stream, int head) const {
        side_view v = first;
        v.codes += head * codes_head + stream * codes_stream;
        v.param += head * param_head + stream * param_stream;
        v.window = (__half *)((char *)v.window + head * window_head + stream * window_stream);
        return v;
    }
};
template <typename F> side_views views_of(const xq_cuda_layer &l, const F &view) {
    const side_view first = view(l, 0, 0), head = view(l, 0, 1), stream = view(l, 1, 0);
    const auto bytes = [](const void *from, const void *to) {
        return (int64_t)((const char *)to - (const char *)from);
    };
    return {first,
            bytes(first.codes, head.codes),
            bytes(first.param, head.param),
            bytes(first.window, head.window),
            bytes(first.codes, stream.codes),
            bytes(first.param, stream.param),
            bytes(first.window, stream.window)};
}

/* What a launch's blocks need to know, worked out on the host: divisions are long code. */
struct decode_call {
    side_views k, v;
    staged at;
    int n_teams, depth, n_open, buffers, n_rep, rows_of_head, n_tiles, n_pages; /* n_pages: of a part, rounded up */
    uint32_t inverse;                                                           /* 2^20 / n_rep, rounded up */

    /* Row r of a KV head, r below 2^12: its token and which of the heads. */
    __host__ __device__ int token_of(int r) const { return (int)(r * inverse >> 20); }
    __host__ __device__ int rest_of(int r) const { return r - token_of(r) * n_rep; }
};
decode_shape decode_shape_of(const xq_cuda_layer &l, int rows_of_lane);

} // namespace xq
