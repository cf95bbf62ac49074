// Only bfloat16: the rest is avx512's.
#define BATCHNORM_ISA avx512_bf16
#include "kernels.h"
