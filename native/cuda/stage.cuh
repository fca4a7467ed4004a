/* stage.cuh: the four parts of a sealed page copied to shared memory by one warp, in the background where the GPU can.
 *
 * Compute capability 9.0: bulk copies that an mbarrier counts.  8.0: cp.async.  7.5: plain loads and stores.
 */
#pragma once

#include "codec.cuh"

namespace xq {

/* Where the parts of a page lie in shared memory; K codes come first. */
struct staged {
    int k_param, v_codes, v_param, bytes, keys; /* keys: bytes of the keys' parts */
    bool whole;                                 /* in memory they follow each other as here */
};

/* p takes the place of the keys: room of at least p_bytes. */
__host__ __device__ inline staged staging(const xq_cuda_layer &l, int p_bytes) {
    staged at;
    at.k_param = XQ_PAGE / 16 * column_bytes(l.plan.k.bits, l.d);
    at.keys = at.k_param + XQ_PAGE / l.plan.k.group * parameter_bytes(l.plan.k, l.d);
    at.v_codes = at.keys > p_bytes ? at.keys : p_bytes;
    at.v_param = at.v_codes + l.e / 16 * column_bytes(l.plan.v.bits, XQ_PAGE);
    at.bytes = at.v_param + parameter_bytes(l.plan.v, XQ_PAGE);
    at.whole = l.plan.k.owner < 0 && l.plan.v.owner < 0 && l.own.k_codes == 0 && l.own.k_param == at.k_param &&
               l.own.v_codes == at.v_codes && l.own.v_param == at.v_param;
    return at;
}

/* Pages j = warp, warp + n_warps, .. of a list in n buffers of a block: page j lies in buffer j % n.  The warp that has
 * done with page j fills its buffer with page j + n, which may be another's; where there are no bulk copies, n is a
 * multiple of n_warps, so that it is its own. */
constexpr int max_buffers = 32;

class page_ring {
  public:
    /* In shared memory. */
    struct marks {
        uint64_t arrived[max_buffers]; /* mbarrier: a page is there */
        int filled[max_buffers];       /* how often the buffer was filled: a barrier alone cannot tell a page that is
                                          two uses away from one that is there */
    };

    __device__ page_ring(uint8_t *buffers, marks &of, int n, const staged &at, int warp, int n_warps, int lane)
        : buffers(buffers), of(of), n(n), at(at), step(n_warps), lane(lane), buffer(warp) {}

    /* By one warp, before a barrier of the block. */
    __device__ void begin() {
#if __CUDA_ARCH__ >= 900
        if (lane < n) {
            of.filled[lane] = 0;
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_of(of.arrived + lane)));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    /* Likewise, after all pages were used, and before begin() is called again. */
    __device__ void end() {
#if __CUDA_ARCH__ >= 900
        if (lane < n) {
            asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(shared_of(of.arrived + lane)));
        }
#endif
    }

    /* Starts to copy a page into the buffer of this warp's current page, with which it has done, or, at first, into the
     * one `steps` of its steps on.  -1: there is none. */
    __device__ void refill(const side_view &k, const side_view &v, int page) { fill(k, v, page, buffer, uses + 2); }
    __device__ void fill_first(const side_view &k, const side_view &v, int page, int steps) {
        fill(k, v, page, buffer + steps * step, 1);
    }
    /* This warp's next page; it stays until next(). */
    __device__ uint8_t *wait() {
#if __CUDA_ARCH__ >= 900
        for (int filled = 0; lane == 0 && filled <= uses;) {
            asm volatile("atom.acquire.cta.shared.or.b32 %0, [%1], 0;"
                         : "=r"(filled)
                         : "r"(shared_of(of.filled + buffer))
                         : "memory");
        }
        __syncwarp();
        const uint32_t barrier = shared_of(of.arrived + buffer);
        asm volatile("{\n.reg .pred done;\nagain:\n"
                     "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
                     "r"(uses & 1)
                     : "memory");
#elif __CUDA_ARCH__ >= 800
        if (n == step) {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        }
#endif
        __syncwarp();
        return buffers + buffer * at.bytes;
    }
    __device__ void next() {
        buffer += step;
        if (buffer >= n) {
            buffer -= n;
            uses++;
        }
    }
    /* Back to the first page. */
    __device__ void restart(int warp) {
        buffer = warp;
        uses = 0;
    }

  private:
    /* times: how often the buffer is filled, this time included. */
    __device__ void fill(const side_view &k, const side_view &v, int page, int to_buffer, int times) {
        if (page < 0) {
            commit();
            return;
        }
        uint8_t *to = buffers + to_buffer * at.bytes;
        const uint8_t *from[] = {k.codes + page * k.codes_stride, k.param + page * k.param_stride,
                                 v.codes + page * v.codes_stride, v.param + page * v.param_stride};
        const int start[] = {0, at.k_param, at.v_codes, at.v_param};
        const int size[] = {at.k_param, at.keys - at.k_param, at.v_param - at.v_codes, at.bytes - at.v_param};
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); // p was written there
        __syncwarp();
        if (lane == 0) {
            const uint32_t barrier = shared_of(of.arrived + to_buffer);
            const int bytes = at.keys + at.bytes - at.v_codes;
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (i == 0 || !at.whole) {
                    asm volatile(
                        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                            shared_of(to + start[i])),
                        "l"(from[i]), "r"(at.whole ? bytes : size[i]), "r"(barrier)
                        : "memory");
                }
            }
            asm volatile("red.release.cta.shared.max.s32 [%0], %1;" ::"r"(shared_of(of.filled + to_buffer)), "r"(times)
                         : "memory");
        }
#else
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            for (int k = 16 * lane; k < size[i]; k += 16 * 32) {
                copy16(to + start[i] + k, from[i] + k);
            }
        }
        commit();
#endif
    }

    static __device__ uint32_t shared_of(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
    static __device__ void copy16(void *to, const void *from) {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_of(to)), "l"(from));
#else
        *(uint4 *)to = *(const uint4 *)from;
#endif
    }

    static __device__ void commit() {
#if __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 900
        asm volatile("cp.async.commit_group;");
#endif
    }

    uint8_t *buffers;
    marks &of;
    int n;
    const staged &at;
    int step, lane, buffer;
    int uses = 0; /* of `buffer` before this page */
};

} // namespace xq
