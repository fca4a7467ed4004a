/* prompt_attend.cu: attention of prompts over F16 rows, for the tensor cores of compute capability 9.0: this file is
 * compiled for sm_90a alone.
 *
 *     y = scale log2(e) q . k + log2(e) mask      p = 2^(y - max y)      out = sum p v / sum p
 *
 * q   F32 [stream][token][head][width]     k, v  F16 [stream][cell][KV head][width]     mask  F16 [stream][token][cell]
 * out F32 [stream][token][head][width], or states of parts (prompt_shape.h), which prompt.cu joins.
 *
 * The plan is FlashAttention-3's (arXiv 2407.08608).  A block has 128 query rows of a KV head, so that a page is read
 * once for many tokens and all their heads, and three warpgroups: of the first, one thread has the copy engine bring
 * pages into two buffers of keys and two of values; the other two have 64 rows each.  While a page's scores become
 * weights, the tensor cores do the product of the page before with its values, and, since the two take turns in giving
 * products to do, also those of the other warpgroup.
 */
#include "check.h"
#include "launch.h"
#include "prompt_rows.cuh"

namespace xq {

namespace {

constexpr int block_threads = 3 * group_threads, stages = 2; /* stages: buffers of keys, and of values */
constexpr int all_done = -1;

/* Of the barriers by number: whose turn it is, of the two warpgroups with rows; queries are there, likewise. */
constexpr int first_turn = 1, first_queries = 3;

/* Shared memory of a block. */
template <int WIDTH> struct prompt_memory {
    __half q[prompt_rows * WIDTH];     /* [channel / 64][row][64] */
    __half k[stages][XQ_PAGE * WIDTH]; /* [channel / 64][cell][64] */
    __half v[stages][XQ_PAGE * WIDTH]; /* [channel / 64][cell][64] */
    uint64_t k_full[stages], k_free[stages], v_full[stages], v_free[stages];
    int page[stages]; /* in k: 2 * page, and 1 more if the mask must be read; all_done behind the last */
};

/* ---- the thread that brings pages ---- */

template <int WIDTH>
__device__ void bring(void *to, const CUtensorMap &from, uint64_t *full, const prompt_work &work, int page) {
    arrive_with_bytes(full, XQ_PAGE * WIDTH * (int)sizeof(__half));
#pragma unroll
    for (int c = 0; c < WIDTH; c += block_channels) {
        copy_box((char *)to + c / block_channels * XQ_PAGE * row_bytes, from, full, c, page * XQ_PAGE, work.head,
                 work.stream);
    }
}

/* Keys of a page come before values of the page before: in this order they are wanted.  A buffer is free for its nth
 * use when it was freed n times; the first wait, for the completion before the first, is none. */
template <int WIDTH>
__device__ void bring_pages(prompt_memory<WIDTH> &m, const CUtensorMap &k, const CUtensorMap &v,
                            const prompt_work &work, const uint8_t *views /* [page] */) {
    int n = 0, before = 0;
    const auto bring_values = [&] {
        const int at = (n - 1) % stages;
        wait_for(&m.v_free[at], (n - 1) / stages - 1);
        bring<WIDTH>(m.v[at], v, &m.v_full[at], work, before);
    };
    for (int page = work.first_page; page < work.end_page; ++page) {
        const int seen = views[page], at = n % stages;
        if (seen == view_none) {
            continue;
        }
        wait_for(&m.k_free[at], n / stages - 1);
        m.page[at] = 2 * page + (seen == view_some);
        bring<WIDTH>(m.k[at], k, &m.k_full[at], work, page);
        if (n > 0) {
            bring_values();
        }
        before = page;
        ++n;
    }
    if (n > 0) {
        bring_values();
    }
    wait_for(&m.k_free[n % stages], n / stages - 1);
    m.page[n % stages] = all_done;
    arrive(&m.k_full[n % stages]);
}

/* ---- warpgroups with rows ---- */

/* scores [64][XQ_PAGE] = q k^T, begun. */
template <int WIDTH> __device__ void begin_scores(float (&scores)[64], const __half *q, const __half *k) {
    const uint64_t from_q = matrix_at(q), from_k = matrix_at(k);
    pin(scores);
    begin_products();
#pragma unroll
    for (int c = 0; c < WIDTH; c += 16) {
        const int block = c / block_channels, bytes = c % block_channels * (int)sizeof(__half);
        multiply_rows(scores, from_q + (block * prompt_rows * row_bytes + bytes) / 16,
                      from_k + (block * XQ_PAGE * row_bytes + bytes) / 16, c > 0);
    }
    end_products();
    pin(scores);
}

/* out [64][WIDTH] += p v, begun. */
template <int WIDTH> __device__ void begin_values(float (&out)[WIDTH / 2], const uint32_t (&p)[32], const __half *v) {
    const uint64_t from = matrix_at(v, XQ_PAGE * row_bytes);
    pin(out);
    begin_products();
#pragma unroll
    for (int i = 0; i < XQ_PAGE / 16; ++i) {
        add_product(out, p + 4 * i, from + i * 16 * row_bytes / 16);
    }
    end_products();
    pin(out);
}

/* All pages of the block for 64 rows: group 0 or 1. */
template <int WIDTH>
__device__ void attend_pages(prompt_memory<WIDTH> &m, const xq_rows_args &a, const prompt_shape &s,
                             const prompt_work &work, int group) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % group_threads / 32;
    const int row = group * group_rows + warp * 16 + lane / 4; // the first of the thread's two
    const __half *q = m.q + group * group_rows * block_channels, *mask[2];
    for (int r = 0; r < 2; ++r) {
        mask[r] = (const __half *)((const char *)a.mask + work.stream * a.mask_stream_stride +
                                   row_of(a, s, work, row + 8 * r).token * a.mask_token_stride) +
                  lane % 4 * 2;
    }
    load_queries<WIDTH>(m.q, a, s, work, group * group_rows);
    meet(first_queries + group, group_threads);

    float scores[64], out[WIDTH / 2], factor[2];
    uint32_t p[32];
    softmax_state state = {{-INFINITY, -INFINITY}, {}};
#pragma unroll
    for (float &x : out) {
        x = 0.0f;
    }
    const auto free = [&](uint64_t *barrier) { // each warp for itself
        if (lane == 0) {
            arrive(barrier);
        }
    };
    const auto weigh_page = [&](int page) {
        if (page & 1) {
            const int cell = page / 2 * XQ_PAGE;
            add_mask(scores, {mask[0] + cell, mask[1] + cell});
        }
        weigh(scores, state, factor);
    };
    const auto my_turn = [&] { meet(first_turn + group, 2 * group_threads); };
    const auto other_turn = [&] { pass(first_turn + (group ^ 1), 2 * group_threads); };

    if (group == 1) {
        other_turn(); // the first group begins
    }
    wait_for(&m.k_full[0], 0);
    int page = m.page[0];
    if (page != all_done) {
        my_turn();
        begin_scores<WIDTH>(scores, q, m.k[0]);
        other_turn();
        wait_for_products<0>();
        pin(scores);
        free(&m.k_free[0]);
        weigh_page(page);
        to_halves(scores, p);
        int n = 0; // the page whose weights p are
        while (true) {
            const int next = (n + 1) % stages, now = n % stages;
            wait_for(&m.k_full[next], (n + 1) / stages);
            page = m.page[next];
            if (page == all_done) {
                break;
            }
            my_turn();
            begin_scores<WIDTH>(scores, q, m.k[next]);
            wait_for(&m.v_full[now], n / stages);
            begin_values<WIDTH>(out, p, m.v[now]);
            other_turn();
            wait_for_products<1>();
            pin(scores);
            free(&m.k_free[next]);
            weigh_page(page);
            wait_for_products<0>();
            pin(out);
            free(&m.v_free[now]);
#pragma unroll
            for (int i = 0; i < WIDTH / 2; ++i) {
                out[i] *= factor[i / 2 % 2];
            }
            to_halves(scores, p);
            ++n;
        }
        wait_for(&m.v_full[n % stages], n / stages);
        begin_values<WIDTH>(out, p, m.v[n % stages]);
        wait_for_products<0>();
        pin(out);
    }
    if (group == 0) {
        my_turn(); // which the other gave last
    }
    store_rows<WIDTH>(out, state, a, s, work, row);
}

/* grid (tile + n_tiles * part, KV head + n_head_kv * stream) */
template <int WIDTH>
__global__ void __launch_bounds__(block_threads, 1)
    attend_prompt(const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
                  const __grid_constant__ xq_rows_args a, const __grid_constant__ prompt_shape s) {
    extern __shared__ char shared[];
    auto &m = *(prompt_memory<WIDTH> *)(shared + -shared_address(shared) % 1024);
    const prompt_work work = work_of(a, s);
    const int group = threadIdx.x / group_threads;
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; ++i) {
            set_barrier(&m.k_full[i], 1);
            set_barrier(&m.v_full[i], 1);
            set_barrier(&m.k_free[i], 2 * group_threads / 32);
            set_barrier(&m.v_free[i], 2 * group_threads / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            wait_for_previous(); // for views: all else was there before they were made
            bring_pages<WIDTH>(m, k, v, work,
                               (const uint8_t *)a.scratch +
                                   ((int64_t)work.stream * s.n_tiles + work.tile) * a.n_kv_pages);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        attend_pages<WIDTH>(m, a, s, work, group - 1);
    }
}

/* ---- launch ---- */

using encoder = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                             const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                             CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* The driver's function that describes a tensor to the copy engine; null: it has none. */
encoder find_encoder() {
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return (encoder)found;
}

/* rows F16 [stream][cell][KV head][width] as boxes of a page by 64 channels. */
bool describe(CUtensorMap &map, const xq_rows_args &a, const uint16_t *rows) {
    static const encoder encode = find_encoder();
    const auto width = (cuuint64_t)a.width, heads = (cuuint64_t)a.n_head_kv;
    const cuuint64_t cells = (cuuint64_t)a.n_kv_pages * XQ_PAGE, row = width * sizeof(uint16_t);
    const cuuint64_t sizes[] = {width, cells, heads, (cuuint64_t)a.n_streams};
    const cuuint64_t strides[] = {row * heads, row, row * heads * cells}; // bytes, from the second axis on
    const cuuint32_t box[] = {block_channels, XQ_PAGE, 1, 1}, every[] = {1, 1, 1, 1};
    return encode && encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, (void *)rows, sizes, strides, box, every,
                            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int WIDTH> int launch(const xq_rows_args &a, const prompt_shape &s, cudaStream_t stream) {
    CUtensorMap k, v;
    if (!describe(k, a, a.k) || !describe(v, a, a.v)) {
        return fail(XQ_ERR_KERNELS, "attend_rows: the CUDA driver could not describe rows to the copy engine");
    }
    const size_t bytes = sizeof(prompt_memory<WIDTH>) + 1024; // to start on a multiple
    if (allow_shared(attend_prompt<WIDTH>, bytes)) {
        const dim3 grid(s.n_tiles * s.n_parts, a.n_head_kv * a.n_streams);
        launch_early(attend_prompt<WIDTH>, grid, block_threads, bytes, stream, k, v, a, s);
    }
    return launched("attend_rows");
}

} // namespace

int launch_prompt_attend(const xq_rows_args &a, const prompt_shape &s, cudaStream_t stream) {
    return a.width == 64 ? launch<64>(a, s, stream) : launch<128>(a, s, stream);
}

} // namespace xq
