// The torch-free core: batch normalisation over raw pointers.
//
// Two arrangements of memory cover every dense layout:
//   planes:  element (n, c, s) at ((n * C) + c) * S + s     contiguous N,C,*
//   columns: element (r, c)    at r * C + c                 channels_last, and N,C
//
// Per channel, with m = float(mean), a = weight / sqrt(var + eps) and b = bias - (mean - m) * a
// rounded once from float64, every kernel computes
//   d = x - m,  z = fma(d, a, b) (+ residual),  y = activation(z).
// Subtracting first keeps y exact however large mean/std is, and because forward and backward share
// a, b and the rounding, the backward recomputes the sign of z instead of reading a saved mask.
#pragma once

#include <cstdint>

namespace batchnorm {

enum class Type { f32, f64, bf16, f16 };

// Numbered as in the op schemas (ops/__init__.py).
enum class Activation { none, relu, relu6, leaky_relu, silu, gelu, hardswish };

// Where the backward finds z, or the slope at z: recomputed from x, from x and the residual, or
// read from the gate that the forward wrote.
enum class Preactivation { from_x, from_residual, from_gate };

struct Shape {
  int64_t n, c, s;  // columns: s is 1
  bool columns;
  int64_t numel() const { return n * c * s; }
  int64_t count() const { return n * s; }  // elements per channel
};

// Runs body(context, begin, end) over parts of [0, count), in parallel.
struct Pool {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, void* context, Body body);
  int threads;
};

struct Problem {
  Shape shape;
  Type type;
  Activation activation;
  Pool pool;
};

struct Statistics {
  double* mean;  // (C,)
  double* var;   // (C,) biased
};

struct Affine {
  const double* weight;  // (C,) or null: 1
  const double* bias;    // (C,) or null: 0
  double eps;
};

// Runs of fewer positions than this are taken together, as columns.
constexpr int64_t short_run = 16;

// The gate: one bit per element, 1 where the activation's slope is 1, in rows padded to bytes: a row
// is C elements in columns, S in planes, C * S in planes of short runs.
struct Forward {
  const void* x;
  const void* residual;  // like x, or null
  Statistics statistics;
  Affine affine;
  void* y;        // like x
  uint8_t* gate;  // or null
};

struct Backward {
  const void* dy;
  const void* x;
  Preactivation preactivation;
  const void* residual;  // like x, for from_residual
  const uint8_t* gate;   // for from_gate
  Statistics statistics;
  Affine affine;
  double* sum_dz;       // (C,) sum of dz
  double* sum_dz_xhat;  // (C,) sum of dz * xhat
  void* dx;             // like x
  void* dz;             // like x, or null: also the gradient of the residual
};

// The means of dz and of dz * xhat over the elements that the moments were taken over; null where
// the statistics were constants.
struct Means {
  const double* dz;
  const double* dz_xhat;
  double of_dz(int64_t c) const { return dz ? dz[c] : 0; }
  double of_dz_xhat(int64_t c) const { return dz_xhat ? dz_xhat[c] : 0; }
};

// One set of entry points per instruction set.
struct Kernels {
  const char* name;
  void (*moments)(const Problem&, const void* x, Statistics);
  void (*normalize)(const Problem&, const Forward&);
  void (*forward)(const Problem&, const Forward&);  // moments and normalize in one visit
  void (*backward_sums)(const Problem&, const Backward&);  // may write dz
  void (*backward_apply)(const Problem&, const Backward&, const Means&);
  void (*backward)(const Problem&, const Backward&);  // both in one visit
};

// The best set that this processor runs for values of a type.
const Kernels& kernels(Type type);

}  // namespace batchnorm
