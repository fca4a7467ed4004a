/* xquant-ops.h: what ggml's backends call to run the operations of node.h.  C, for ggml-cpu.c. */
#ifndef XQUANT_OPS_H
#define XQUANT_OPS_H

#include <stdbool.h>

struct ggml_tensor;
struct xq_backend;

#ifdef __cplusplus
extern "C" {
#endif

/* Runs a node on the CPU: thread ith of nth.  One that is refused, with a message in the log, gives not-a-numbers. */
__attribute__((visibility("default"))) void xquant_compute_cpu(const struct ggml_tensor *node, int ith, int nth);
/* Enqueues a node on a CUDA stream; false: it was refused, with a message in the log. */
__attribute__((visibility("default"))) bool xquant_compute_cuda(const struct xq_backend *cuda,
                                                                const struct ggml_tensor *node, void *cuda_stream);

#ifdef __cplusplus
}
#endif

#endif /* XQUANT_OPS_H */
