/* prompt_wgmma.cuh: the instructions of compute capability 9.0 that prompt_attend.cu is made of.
 *
 * A warpgroup is four warps.  A product D += A B of 64 rows and n columns over 16 steps is one instruction of all of
 * them, which runs beside others until it is waited for.  D lies in registers: with w the warp of the group and l the
 * lane,
 *
 *     d[4 j + 2 r + k]  is of row 16 w + l / 4 + 8 r and column 8 j + 2 (l % 4) + k
 *
 * and A too, if it does not come from shared memory: halves a[r + 2 i] of row 16 w + l / 4 + 8 r and steps
 * 8 i + 2 (l % 4) and the next, which is what D's columns become when two neighbours are rounded to halves.
 *
 * Matrices in shared memory are blocks of 64 halves by n rows, as the copy engine writes them: rows of 128 bytes one
 * after the other, and within row i the 16 bytes c at place c ^ (i % 8), so that eight rows meet no bank twice.  Blocks
 * start on multiples of 1024 bytes.
 */
#pragma once

#include <cstdint>
#include <cuda.h>

namespace xq {

/* ---- barriers in shared memory ---- */

__device__ inline uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ inline void set_barrier(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

__device__ inline void arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/* Arrives, and lets the barrier wait for so many bytes of the copy engine besides. */
__device__ inline void arrive_with_bytes(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

/* Waits for the barrier's nth completion, counted from 0; of a barrier in turn with another, only the newest two can be
 * told apart. */
__device__ inline void wait_for(uint64_t *barrier, int nth) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(shared_address(barrier)),
                 "r"(nth & 1)
                 : "memory");
}

/* Barriers by number, 1 to 15, of so many threads: to wait, or to count as having come and go on. */
__device__ inline void meet(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ inline void pass(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

/* ---- the copy engine ---- */

/* A box of a tensor [stream][KV head][cell][channel] to shared memory; the barrier counts its bytes. */
__device__ inline void copy_box(void *to, const CUtensorMap &from, uint64_t *barrier, int channel, int cell, int head,
                                int stream) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
                 "l"(&from), "r"(shared_address(barrier)), "r"(channel), "r"(cell), "r"(head), "r"(stream)
                 : "memory");
}

/* What this thread wrote to shared memory is seen by products and copies that begin after the next barrier. */
__device__ inline void publish_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- products ---- */

/* Where a matrix lies in shared memory; next_block: bytes to the next 64 columns, of one whose columns lie side by
 * side; moved on by bytes / 16. */
__device__ inline uint64_t matrix_at(const void *p, int next_block = 16) {
    constexpr uint64_t eight_rows = 1024 / 16, swizzle_128 = 1;
    return (shared_address(p) & 0x3ffff) / 16 | (uint64_t)(next_block / 16) << 16 | eight_rows << 32 |
           swizzle_128 << 62;
}

/* Before products that read registers which were written since the last ones. */
__device__ inline void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void end_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* Until all but the newest N groups of products are done. */
template <int N> __device__ inline void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/* The compiler moves no use of these registers over this point: it does not know what products write, and when. */
template <int N> __device__ inline void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

#define XQ_NAMES_32                                                                                                    \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define XQ_NAMES_64                                                                                                    \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                 \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define XQ_8(d, i)                                                                                                     \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define XQ_32(d, i) XQ_8(d, i), XQ_8(d, i + 8), XQ_8(d, i + 16), XQ_8(d, i + 24)

/* D [64][128] = A B^T, or D += A B^T: a [64][16] and b [128][16] in shared memory. */
__device__ inline void multiply_rows(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    asm volatile("{\n"
                 ".reg .pred add;\n"
                 "setp.ne.b32 add, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" XQ_NAMES_64 "}, %64, %65, add, 1, 1, 0, 0;\n"
                 "}\n"
                 : XQ_32(d, 0), XQ_32(d, 32)
                 : "l"(a), "l"(b), "r"((int)add));
}

/* D [64][width] += A B: a [64][16] in registers, b [16][width] in shared memory. */
__device__ inline void add_product(float (&d)[64], const uint32_t *a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" XQ_NAMES_64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : XQ_32(d, 0), XQ_32(d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ inline void add_product(float (&d)[32], const uint32_t *a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" XQ_NAMES_32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : XQ_32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef XQ_NAMES_32
#undef XQ_NAMES_64
#undef XQ_8
#undef XQ_32

} // namespace xq
