// Chooses the instruction set when the library is first used.
#include <cstdlib>
#include <cstring>

#include "core.h"

namespace batchnorm {

namespace baseline { extern const Kernels table; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
namespace avx512_bf16 { extern const Kernels table; }
#endif

static const Kernels& choose(Type type) {
#if defined(__x86_64__)
  // A test runs the lesser sets on a processor that has the better.
  const char* most = std::getenv("BATCHNORM_CPU_ISA");
  auto allowed = [&](const char* name) { return !most || !std::strcmp(most, name); };
  __builtin_cpu_init();
  if (type == Type::bf16 && allowed("avx512_bf16") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512_bf16::table;
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512::table;
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return avx2::table;
#endif
  return baseline::table;
}

const Kernels& kernels(Type type) {
  static const Kernels& narrow = choose(Type::bf16);
  static const Kernels& wide = choose(Type::f32);
  return type == Type::bf16 ? narrow : wide;
}

}  // namespace batchnorm
