/* Instances of attend_solo.cuh: heads 256 wide, 8 query rows. */
#include "attend_solo.cuh"

namespace xq {

template int launch_solo_of<256, 1>(const xq_store &, const xq_attend_args &, const wide_call &, cudaStream_t);

} // namespace xq
