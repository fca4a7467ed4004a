/* Instances of attend_wide.cuh: teams of 4 warps, 2 tiles of 16 channels each. */
#include "attend_wide.cuh"

namespace xq {

template int launch_wide_of<4, 2, 1, false>(const xq_store &, const xq_attend_args &, const wide_call &, cudaStream_t);
template int launch_wide_of<4, 2, 2, false>(const xq_store &, const xq_attend_args &, const wide_call &, cudaStream_t);

} // namespace xq
