/* stage.cuh: the four parts of a sealed page copied to shared memory by a team of warps, in the background where the
 * GPU can.
 *
 * Compute capability 9.0: bulk copies that an mbarrier counts.  8.0: cp.async.  7.5: plain loads and stores.
 */
#pragma once

#include "team.cuh"

namespace xq {

/* Where the parts of a page lie in shared memory; K codes come first. */
struct staged {
    int k_param, v_codes, v_param, bytes;
    bool whole; /* in memory they follow each other as here */
};

/* Whether all parts of both sides have the same distances from page to page, head to head, stream to stream. */
inline bool same_steps(const xq_side_store &k, const xq_side_store &v) {
    const auto steps = [&](int64_t page, int64_t head, int64_t stream) {
        return page == k.codes_page && head == k.codes_head && stream == k.codes_stream;
    };
    return steps(k.param_page, k.param_head, k.param_stream) && steps(v.codes_page, v.codes_head, v.codes_stream) &&
           steps(v.param_page, v.param_head, v.param_stream);
}

/* keys_alone: without the parts of values. */
inline staged staging(const xq_store &store, bool keys_alone = false) {
    const xq_side_store &k = store.k, &v = store.v;
    staged parts;
    parts.k_param = (int)packed_bytes(k.plan.bits, k.width, XQ_PAGE);
    parts.v_codes = parts.k_param + (int)page_param_bytes(k.plan, true, k.width);
    parts.v_param = parts.v_codes + (keys_alone ? 0 : (int)packed_bytes(v.plan.bits, XQ_PAGE, v.width));
    parts.bytes = parts.v_param + (keys_alone ? 0 : (int)page_param_bytes(v.plan, false, v.width));
    const auto lies = [&](const uint8_t *part, int at) { return (uintptr_t)part == (uintptr_t)k.codes + at; };
    parts.whole =
        lies(k.param, parts.k_param) &&
        (keys_alone ? k.param_page == k.codes_page && k.param_head == k.codes_head && k.param_stream == k.codes_stream
                    : same_steps(k, v) && lies(v.codes, parts.v_codes) && lies(v.param, parts.v_param));
    return parts;
}

/* A sealed page in shared memory. */
struct page_in_shared {
    const uint8_t *at; /* K codes | K parameters | V codes | V parameters */
    const staged &parts;
    const xq_side &k, &v;
    int number;  /* of the stream */
    bool masked; /* whether a mask that this warp adds is not 0 */

    __device__ const uint8_t *k_codes() const { return at; }
    __device__ const uint8_t *k_param() const { return at + parts.k_param; }
    __device__ const uint8_t *v_codes() const { return at + parts.v_codes; }
    __device__ const uint8_t *v_param() const { return at + parts.v_param; }
};

constexpr int max_buffers = 32; /* of a block */

/* A team's pages, PLACE says which team's, one after the other, in `depth` buffers: page n lies in buffer n % depth.  A
 * buffer is filled again when the whole team has done with it, which the team knows as soon as it has met over the next
 * page. */
template <typename PLACE> class page_ring {
  public:
    /* In shared memory: an mbarrier for each buffer, which says that a page is there, and where pages come from. */
    struct marks {
        uint64_t arrived[max_buffers];
        uint32_t left[max_buffers]; /* warps that have left a page before the others of the team */
        const uint8_t *from[4];
        int64_t stride[4]; /* bytes from page to page */
    };

    /* By one thread, before a barrier of the block. */
    static __device__ void prepare(marks &of, const side_view &k, const side_view &v) {
        of.from[0] = k.codes, of.from[1] = k.param, of.from[2] = v.codes, of.from[3] = v.param;
        of.stride[0] = k.codes_page, of.stride[1] = k.param_page;
        of.stride[2] = v.codes_page, of.stride[3] = v.param_page;
    }

    /* buffers: of the block, depth of them for each team. */
    __device__ page_ring(uint8_t *buffers, marks &of, int depth, const staged &parts, const PLACE &warp)
        : buffers(buffers + warp.team * depth * parts.bytes), of(of), first(warp.team * depth), depth(depth),
          parts(parts), warp(warp) {}

    /* By a whole team, before a barrier of the block. */
    __device__ void begin() { prepare_marks(warp.member == 0 ? depth : 0); }
    /* Starts to copy a page, by the whole team; -1: there is none.  Into the n-th buffer at first, then into that of
     * the page before the current one. */
    __device__ void fill_first(int page, int n) { fill(page, n); }
    __device__ void refill(int page) { fill(page, buffer == 0 ? depth - 1 : buffer - 1); }

    /* ---- where a team's warps do not meet, on GPUs that have bulk copies ---- */

    /* Instead of begin() and fill_first(), for all teams by the first warp: page(n) is the nth, -1: there is none, and
     * team n % n_teams takes it.  Only the first n_pages of them. */
    template <typename PAGE> __device__ void begin_all(int n_teams, int n_pages, const PAGE &page) {
        prepare_marks(n_teams * depth);
        __syncwarp();
        const int number = warp.lane < n_pages ? page(warp.lane) : -1;
        if (number >= 0) {
            copy(number, warp.lane % n_teams * depth + warp.lane / n_teams);
        }
    }
    /* By a warp that has done with the current page: the next one is current.  The last one of the team to leave a page
     * starts to copy `page` in its place; -1: there is none. */
    __device__ void leave(int page) {
#if __CUDA_ARCH__ >= 900
        __syncwarp();
        if (warp.lane == 0) {
            uint32_t others;
            asm volatile("atom.acq_rel.cta.shared.inc.u32 %0, [%1], %2;"
                         : "=r"(others)
                         : "r"(shared_of(of.left + first + buffer)), "r"(warp.size - 1)
                         : "memory");
            if (others == warp.size - 1 && page >= 0) {
                copy(page, buffer);
            }
        }
#endif
        next();
    }

    /* The team's current page; it stays until the team has met over the next one. */
    __device__ uint8_t *wait() {
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
        warp.meet();
#endif
        return buffers + buffer * parts.bytes;
    }
    __device__ void next() {
        if (++buffer == depth) {
            buffer = 0;
            phase ^= 1;
        }
    }

  private:
    /* By a whole team. */
    __device__ void fill(int page, int to_buffer) {
#if __CUDA_ARCH__ >= 900
        if (page >= 0 && warp.member == 0 && warp.lane == 0) {
            copy(page, to_buffer);
        }
#else
        if (page >= 0) {
            copy(page, to_buffer);
        }
        commit();
#endif
    }
    /* By one lane where copies are bulk copies, else by a whole team. */
    __device__ void copy(int page, int to_buffer) {
        uint8_t *to = buffers + to_buffer * parts.bytes;
        const int start[] = {0, parts.k_param, parts.v_codes, parts.v_param};
        const int size[] = {parts.k_param, parts.v_codes - parts.k_param, parts.v_param - parts.v_codes,
                            parts.bytes - parts.v_param};
#if __CUDA_ARCH__ >= 900
        const uint32_t barrier = shared_of(of.arrived + first + to_buffer);
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(parts.bytes) : "memory");
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if ((i == 0 || !parts.whole) && (!PLACE::may_lack_values || size[i] > 0)) {
                const int bytes = parts.whole ? parts.bytes : size[i];
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::"
                             "bytes [%0], [%1], %2, [%3];" ::"r"(shared_of(to + start[i])),
                             "l"(of.from[i] + page * of.stride[i]), "r"(bytes), "r"(barrier)
                             : "memory");
            }
        }
#else
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            for (int b = 16 * (32 * warp.member + warp.lane); b < size[i]; b += 16 * 32 * warp.size) {
                copy16(to + start[i] + b, of.from[i] + page * of.stride[i] + b);
            }
        }
#endif
    }

    /* Of the first n buffers from the team's first on. */
    __device__ void prepare_marks(int n) const {
#if __CUDA_ARCH__ >= 900
        if (warp.lane < n) {
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_of(of.arrived + first + warp.lane)));
            of.left[first + warp.lane] = 0;
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
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

    uint8_t *buffers; /* the team's */
    marks &of;
    int first, depth; /* first: of the team's buffers, in the block */
    const staged &parts;
    const PLACE &warp;
    int buffer = 0, phase = 0;
};

} // namespace xq
