#define BATCHNORM_ISA avx2
#include "kernels.h"
