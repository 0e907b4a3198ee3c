// tree_attention with products in bf16, caches in bf16: mma.cuh.

#include "cuda/attention/mma.cuh"

namespace saffron::cuda {

void launch_bf16(const Arguments& a, Stream stream) { launch_tiles<Tile, BFloat16>(a, stream); }

}  // namespace saffron::cuda
