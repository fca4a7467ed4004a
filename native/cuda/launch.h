/* launch.h: the launchers that the files of this folder give each other; arguments were checked in api.cu. */
#pragma once

#include "store.h"

#include <cuda_runtime.h>

namespace xq {

/* XQ_OK, or XQ_ERR_KERNELS with a message if the last launch failed. */
int launched(const char *what);

/* Whether this device can begin a launch before the one before it has ended. */
bool can_launch_early();

/* Shared memory that a block of this device may have. */
int shared_limit();

/* Whether this device has the instructions of prompt_wgmma.cuh, which no later one has; its multiprocessors. */
bool has_wgmma();
int processors();

/* Lets a kernel have more dynamic shared memory than the usual; false: CUDA refuses, and launched() will say so. */
template <typename K> bool allow_shared(K kernel, size_t bytes) {
    return bytes <= 48 * 1024 ||
           cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes) == cudaSuccess;
}

/* Launches a kernel that may begin before the launch before it has ended, and calls wait_for_previous() before it
 * touches anything that one reads or writes; where the GPU cannot, it begins afterwards. */
template <typename... Params, typename... Args>
void launch_early(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream,
                  Args... args) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = can_launch_early() ? 1 : 0;
    cudaLaunchKernelEx(&config, kernel, args...);
}

#ifdef __CUDACC__
/* Waits for the launch before this one to end, and with it for all before that. */
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* Lets the launch after this one begin, as soon as all blocks have said so. */
__device__ inline void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

int launch_update(const xq_store &store, const xq_update_args &args, cudaStream_t stream);

/* Whether a tensor-core kernel covers what a layer stores; the general one covers everything. */
bool decode_covers(const xq_store &store);
bool wide_covers(const xq_store &store);
int launch_decode(const xq_store &store, const xq_attend_args &args, cudaStream_t stream);
/* The wide kernel, and what joins its parts. */
int launch_wide(const xq_store &store, const xq_attend_args &args, cudaStream_t stream);
/* width channels of the output, from first_channel on. */
int launch_merge_wide(const xq_store &store, const xq_attend_args &args, int first_channel, int width,
                      cudaStream_t stream);
/* The general kernel, and what joins its states. */
int launch_general(const xq_store &store, const xq_attend_args &args, cudaStream_t stream);
int launch_merge(const xq_store &store, const xq_attend_args &args, cudaStream_t stream);

int launch_unpack(const xq_store &store, const xq_unpack_args &args, cudaStream_t stream);

/* Attention over F16 rows: whether there is a kernel for it, on this device; what of scratch memory it needs. */
bool prompt_covers(const xq_rows_args &args);
int64_t prompt_scratch(const xq_rows_args &args);
int launch_prompt(const xq_rows_args &args, cudaStream_t stream);
/* Of it, the kernel: views are in scratch memory, and states come there. */
struct prompt_shape;
int launch_prompt_attend(const xq_rows_args &args, const prompt_shape &shape, cudaStream_t stream);

int launch_read_keys(const xq_store &store, const xq_keys_args &args, cudaStream_t stream);
int launch_write_keys(const xq_store &store, const xq_keys_args &args, cudaStream_t stream);

} // namespace xq
