#define BATCHNORM_ISA avx512
#include "kernels.h"
