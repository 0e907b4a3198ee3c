#include <cstdlib>
#include <cstring>

#include "cpu/simd/kernels.h"

#if defined(__linux__) && defined(SAFFRON_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace saffron::cpu {

namespace generic {
extern const Kernels table;
}
#ifdef SAFFRON_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#ifdef SAFFRON_HAS_AMX
namespace avx512bf16 {
Kernels over(const Kernels& avx512, const char* name);
}
namespace amx {
Kernels over(const Kernels& avx512, const char* name);
}
#endif
#endif

namespace {

#if defined(__linux__) && defined(SAFFRON_HAS_AMX)
/// AMX is there, and the kernel lets this process use its registers.
bool amx_usable() {
  unsigned a, b, c, d = 0;
  __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(7), "2"(0));
  constexpr unsigned bf16 = 1u << 22, tiles = 1u << 24;
  if ((d & bf16) == 0 || (d & tiles) == 0) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#else
bool amx_usable() { return false; }
#endif

Kernels choose() {
#ifdef SAFFRON_X86
  const char* most = std::getenv("SAFFRON_CPU_ISA");
  const bool any = most == nullptr || *most == '\0';
  auto allowed = [&](const char* name) {
    // In ascending order: asking for one rules out those after it.
    for (const char* known : {"generic", "avx2", "avx512", "avx512bf16", "amx"}) {
      if (std::strcmp(known, name) == 0) return true;
      if (!any && std::strcmp(known, most) == 0) return false;
    }
    return false;
  };
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef SAFFRON_HAS_AMX
  if (has_avx512 && __builtin_cpu_supports("avx512bf16") && allowed("avx512bf16")) {
    return allowed("amx") && amx_usable() ? amx::over(avx512::table, "amx")
                                          : avx512bf16::over(avx512::table, "avx512bf16");
  }
#endif
  if (has_avx512 && allowed("avx512")) return avx512::table;
  if (has_avx2 && allowed("avx2")) return avx2::table;
#endif
  return generic::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace saffron::cpu
