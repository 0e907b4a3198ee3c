// tree_attention with products in fp16, caches in fp16: mma.cuh.

#include "cuda/attention/mma.cuh"

namespace saffron::cuda {

void launch_fp16(const Arguments& a, Stream stream) { launch_tiles<Tile, Float16>(a, stream); }

}  // namespace saffron::cuda
