/* xquant-cuda.h: what ggml's CUDA backend asks of us. */
#pragma once

struct ggml_tensor;

#if defined(_WIN32)
#define XQUANT_NODE_API __declspec(dllexport)
#else
#define XQUANT_NODE_API __attribute__((visibility("default")))
#endif

/* Whether a GGML_OP_CUSTOM node is one of ours. */
XQUANT_NODE_API bool xquant_cuda_supports(const ggml_tensor *node);
/* Enqueues it on a CUDA stream; false: it is not ours, or was refused, with a message on stderr. */
XQUANT_NODE_API bool xquant_cuda_compute(const ggml_tensor *node, void *stream);
