// tree_attention with products in fp16, fp8 caches: mma.cuh.

#include "cuda/attention/mma.cuh"

namespace saffron::cuda {

void launch_fp16_fp8(const Arguments& a, Stream stream) {
  launch_tiles<Float8Tile, Float16>(a, stream);
}

}  // namespace saffron::cuda
