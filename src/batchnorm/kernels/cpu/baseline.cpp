#define BATCHNORM_ISA baseline
#include "kernels.h"
