/* xquant-ops.h: what ggml's backends call to run the operations of node.h.  C, for ggml-cpu.c. */
#ifndef XQUANT_OPS_H
#define XQUANT_OPS_H

#include <stdbool.h>
#include <stdint.h>

struct ggml_tensor;
struct xq_backend;
struct ggml_backend;

#ifdef __cplusplus
extern "C" {
#endif

/* Runs a node on the CPU: thread ith of nth.  False: it was refused, with a message in the log, and changed nothing. */
__attribute__((visibility("default"))) bool xquant_compute_cpu(const struct ggml_tensor *node, int ith, int nth);
/* Enqueues a node on a CUDA stream; false: it was refused, with a message in the log. */
__attribute__((visibility("default"))) bool xquant_compute_cuda(const struct xq_backend *cuda,
                                                                const struct ggml_tensor *node, void *cuda_stream);

/* llama.cpp's own attention over pages that a node of ours unpacked: scratch memory, in bytes, with which a kernel of
 * ours does it; -1: llama.cpp's is to do it. */
__attribute__((visibility("default"))) int64_t xquant_prompt_scratch(const struct xq_backend *cuda,
                                                                     const struct ggml_tensor *node);
/* As xquant_compute_cuda. */
__attribute__((visibility("default"))) bool xquant_prompt(const struct xq_backend *cuda, const struct ggml_tensor *node,
                                                          void *scratch, void *cuda_stream);

/* What a worker of llama.cpp's RPC says of itself in its first answer: 0, or the version of the nodes that all of its
 * devices run, with a flag if all of these are CPUs.  The version grows with every change of node.h, and of what
 * xquant.h says of storage: then the two sides must be of the same build again. */
enum { XQUANT_WORKER_VERSION = 3, XQUANT_WORKER_CPU = 0x80 };
__attribute__((visibility("default"))) uint8_t xquant_worker(struct ggml_backend *const *backends, int n);

#ifdef __cplusplus
}
#endif

#endif /* XQUANT_OPS_H */
