/* stage.cuh: the four parts of a sealed page copied to shared memory by a team of warps, in the background where the
 * GPU can.
 *
 * Compute capability 9.0: bulk copies that an mbarrier counts.  8.0: cp.async.  7.5: plain loads and stores.
 */
#pragma once

#include "codec.cuh"

namespace xq {

/* Where the parts of a page lie in shared memory; K codes come first. */
struct staged {
    int k_param, v_codes, v_param, bytes;
    bool whole; /* in memory they follow each other as here */
};

__host__ __device__ inline staged staging(const xq_cuda_layer &l) {
    staged at;
    at.k_param = XQ_PAGE / 16 * column_bytes(l.plan.k.bits, l.d);
    at.v_codes = at.k_param + XQ_PAGE / l.plan.k.group * parameter_bytes(l.plan.k, l.d);
    at.v_param = at.v_codes + l.e / 16 * column_bytes(l.plan.v.bits, XQ_PAGE);
    at.bytes = at.v_param + parameter_bytes(l.plan.v, XQ_PAGE);
    at.whole = l.plan.k.owner < 0 && l.plan.v.owner < 0 && l.own.k_codes == 0 && l.own.k_param == at.k_param &&
               l.own.v_codes == at.v_codes && l.own.v_param == at.v_param;
    return at;
}

constexpr int max_buffers = 32; /* of a block */

/* A team's pages, one after the other, in `depth` buffers: page n lies in buffer n % depth.  A buffer is filled again
 * when the whole team has done with it, which the team knows as soon as it has met over the next page. */
template <int TEAM> class page_ring {
  public:
    /* In shared memory: an mbarrier for each buffer, which says that a page is there, and where pages come from. */
    struct marks {
        uint64_t arrived[max_buffers];
        const uint8_t *from[4];
        int64_t stride[4]; /* bytes from page to page */
    };

    /* By one thread, before a barrier of the block. */
    static __device__ void prepare(marks &of, const side_view &k, const side_view &v) {
        of.from[0] = k.codes, of.from[1] = k.param, of.from[2] = v.codes, of.from[3] = v.param;
        of.stride[0] = k.codes_stride, of.stride[1] = k.param_stride;
        of.stride[2] = v.codes_stride, of.stride[3] = v.param_stride;
    }

    __device__ page_ring(uint8_t *buffers, marks &of, int depth, const staged &at, int team, int member, int lane)
        : buffers(buffers + team * depth * at.bytes), of(of), first(team * depth), depth(depth), at(at), member(member),
          lane(lane) {}

    /* By a whole team, before a barrier of the block. */
    __device__ void begin() {
#if __CUDA_ARCH__ >= 900
        if (member == 0 && lane < depth) {
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_of(of.arrived + first + lane)));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
        buffer = phase = 0;
    }
    /* Starts to copy a page, by the whole team; -1: there is none.  Into the n-th buffer at first, then into that of
     * the page before the current one. */
    __device__ void fill_first(int page, int n) { fill(page, n); }
    __device__ void refill(int page) { fill(page, buffer == 0 ? depth - 1 : buffer - 1); }
    /* The team's current page; it stays until the team has met over the next one.  meet(): the team's barrier. */
    template <typename M> __device__ uint8_t *wait(const M &meet) {
#if __CUDA_ARCH__ >= 900
        asm volatile("{\n.reg .pred done;\nagain:\n"
                     "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done "
                     "bra again;\n}" ::"r"(shared_of(of.arrived + first + buffer)),
                     "r"(phase)
                     : "memory");
        __syncwarp();
#else
#if __CUDA_ARCH__ >= 800
        if (depth > 2) { // the pages behind this one may be on their way
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
#endif
        meet();
#endif
        return buffers + buffer * at.bytes;
    }
    __device__ void next() {
        if (++buffer == depth) {
            buffer = 0;
            phase ^= 1;
        }
    }

  private:
    __device__ void fill(int page, int to_buffer) {
        if (page < 0) {
            commit();
            return;
        }
        uint8_t *to = buffers + to_buffer * at.bytes;
        const int start[] = {0, at.k_param, at.v_codes, at.v_param};
        const int size[] = {at.k_param, at.v_codes - at.k_param, at.v_param - at.v_codes, at.bytes - at.v_param};
#if __CUDA_ARCH__ >= 900
        if (member == 0 && lane == 0) {
            const uint32_t barrier = shared_of(of.arrived + first + to_buffer);
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(at.bytes) : "memory");
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (i == 0 || !at.whole) {
                    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::"
                                 "bytes [%0], [%1], %2, [%3];" ::"r"(shared_of(to + start[i])),
                                 "l"(of.from[i] + page * of.stride[i]), "r"(at.whole ? at.bytes : size[i]), "r"(barrier)
                                 : "memory");
                }
            }
        }
#else
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            for (int b = 16 * (32 * member + lane); b < size[i]; b += 16 * 32 * TEAM) {
                copy16(to + start[i] + b, of.from[i] + page * of.stride[i] + b);
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
    int first, depth;
    const staged &at;
    int member, lane, buffer = 0, phase = 0;
};

} // namespace xq
