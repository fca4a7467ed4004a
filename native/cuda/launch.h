/* launch.h: the launchers that the files of this folder give each other; arguments were checked in api.cu. */
#pragma once

#include "xquant_cuda.h"

#include <cuda_runtime.h>

namespace xq {

/* XQ_OK, or XQ_ERR_KERNELS with a message if the last launch failed. */
int launched(const char *what);

/* Shared memory that a block of this device may have. */
int shared_limit();

int launch_update(const xq_cuda_layer &l, const xq_cuda_update_args &a, cudaStream_t stream);

/* Whether the tensor-core kernel covers what a layer stores; the general one covers everything. */
bool decode_covers(const xq_cuda_layer &l);
int launch_decode(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream);
int launch_general(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream);

int launch_merge(const xq_cuda_layer &l, int n_parts, int n_rows, int n_head, const float *partial, const float *sinks,
                 float *out, cudaStream_t stream);
int launch_unpack(const xq_cuda_layer &l, const xq_cuda_unpack_args &a, cudaStream_t stream);
int launch_read_keys(const xq_cuda_layer &l, const xq_cuda_shift_args &a, cudaStream_t stream);
int launch_write_keys(const xq_cuda_layer &l, const xq_cuda_shift_args &a, cudaStream_t stream);

} // namespace xq
