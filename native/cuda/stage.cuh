/* stage.cuh: the four parts of a sealed page copied to shared memory by one warp, in the background where the GPU can.
 *
 * Compute capability 9.0: bulk copies that an mbarrier counts.  8.0: cp.async.  7.5: plain loads and stores.
 */
#pragma once

#include "codec.cuh"

namespace xq {

/* Where the parts of a page lie in shared memory; K codes come first. */
struct staged {
    int v_codes, k_param, v_param, bytes;
};

__host__ __device__ inline staged staging(const xq_cuda_layer &l) {
    staged at;
    at.v_codes = XQ_PAGE / 16 * column_bytes(l.plan.k.bits, l.d);
    at.k_param = at.v_codes + l.e / 16 * column_bytes(l.plan.v.bits, XQ_PAGE);
    at.v_param = at.k_param + XQ_PAGE / l.plan.k.group * parameter_bytes(l.plan.k, l.d);
    at.bytes = at.v_param + parameter_bytes(l.plan.v, XQ_PAGE);
    return at;
}

/* One or two buffers of a warp, filled and read in turn. */
class page_stages {
  public:
    /* barriers: [n_stages] of this warp, in shared memory. */
    __device__ page_stages(uint8_t *buffers, uint64_t *barriers, int n_stages, const staged &at, int lane)
        : buffers(buffers), barriers(barriers), n_stages(n_stages), at(at), lane(lane) {
#if __CUDA_ARCH__ >= 900
        if (lane < n_stages) {
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_of(barriers + lane)));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        __syncwarp();
#endif
    }

    /* Starts to copy a page into the next buffer. */
    __device__ void fill(const side_view &k, const side_view &v, int page) {
        uint8_t *to = buffers + filling * at.bytes;
        const uint8_t *from[] = {k.codes + page * k.codes_stride, v.codes + page * v.codes_stride,
                                 k.param + page * k.param_stride, v.param + page * v.param_stride};
        const int start[] = {0, at.v_codes, at.k_param, at.v_param, at.bytes};
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
            const uint32_t barrier = shared_of(barriers + filling);
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(at.bytes) : "memory");
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                        shared_of(to + start[i])),
                    "l"(from[i]), "r"(start[i + 1] - start[i]), "r"(barrier)
                    : "memory");
            }
        }
#else
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            for (int k = start[i] + 16 * lane; k < start[i + 1]; k += 16 * 32) {
                copy16(to + k, from[i] + k - start[i]);
            }
        }
#endif
        filling ^= n_stages - 1;
    }
    /* Ends what fill() began, or did not. */
    __device__ void commit() {
#if __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 900
        asm volatile("cp.async.commit_group;");
#endif
    }

    /* The oldest page that was filled; it stays until it is released. */
    __device__ const uint8_t *wait() {
#if __CUDA_ARCH__ >= 900
        const uint32_t barrier = shared_of(barriers + reading);
        asm volatile("{\n.reg .pred done;\nagain:\n"
                     "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
                     "r"(phase >> reading & 1)
                     : "memory");
        phase ^= 1 << reading;
#elif __CUDA_ARCH__ >= 800
        if (n_stages == 2) {
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
#endif
        __syncwarp();
        return buffers + reading * at.bytes;
    }
    __device__ void release() {
        reading ^= n_stages - 1;
        __syncwarp();
    }

  private:
    static __device__ uint32_t shared_of(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
    static __device__ void copy16(void *to, const void *from) {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_of(to)), "l"(from));
#else
        *(uint4 *)to = *(const uint4 *)from;
#endif
    }

    uint8_t *buffers;
    uint64_t *barriers;
    int n_stages;
    const staged &at;
    int lane, filling = 0, reading = 0;
    uint32_t phase = 0; /* of each barrier, a bit */
};

} // namespace xq
