// Activations and their derivatives on vectors. Included once per instruction set.
#include <cmath>

namespace batchnorm::BATCHNORM_ISA {

// exp in float: 2^n * 2^f with f in [-1/2, 1/2], Cephes' polynomial; relative error 1e-7.
inline vfloat vexp(vfloat x) {
  using S = OfFloat;
  x = x < S::set(-87.0f) ? S::set(-87.0f) : x;
  x = x > S::set(88.0f) ? S::set(88.0f) : x;
  const vfloat magic = S::set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat shifted = S::fma(x, S::set(1.44269504f), magic);
  const vfloat n = shifted - magic;
  vfloat f = S::fma(n, S::set(-0.693359375f), x);
  f = S::fma(n, S::set(2.12194440e-4f), f);
  vfloat p = S::set(1.9875691500e-4f);
  p = S::fma(p, f, S::set(1.3981999507e-3f));
  p = S::fma(p, f, S::set(8.3334519073e-3f));
  p = S::fma(p, f, S::set(4.1665795894e-2f));
  p = S::fma(p, f, S::set(1.6666665459e-1f));
  p = S::fma(p, f, S::set(5.0000001201e-1f));
  p = S::fma(p, f * f, f + S::set(1.0f));
  const vint exponent = ((vint)shifted - (vint)magic + 127) << 23;
  return p * (vfloat)exponent;
}

// erf in float: Abramowitz and Stegun 7.1.26, absolute error 1.5e-7; gauss is exp(-x*x).
inline vfloat verf(vfloat x, vfloat gauss) {
  using S = OfFloat;
  const vfloat magnitude = x < S::set(0.0f) ? -x : x;
  const vfloat t = S::set(1.0f) / S::fma(magnitude, S::set(0.3275911f), S::set(1.0f));
  vfloat p = S::set(1.061405429f);
  p = S::fma(p, t, S::set(-1.453152027f));
  p = S::fma(p, t, S::set(1.421413741f));
  p = S::fma(p, t, S::set(-0.284496736f));
  p = S::fma(p, t, S::set(0.254829592f));
  const vfloat e = S::set(1.0f) - p * t * gauss;
  return x < S::set(0.0f) ? -e : e;
}

inline vdouble vexp(vdouble x) {
  vdouble y;
  for (int i = 0; i < double_lanes; ++i) y[i] = std::exp(x[i]);
  return y;
}
inline vdouble verf(vdouble x, vdouble) {
  vdouble y;
  for (int i = 0; i < double_lanes; ++i) y[i] = std::erf(x[i]);
  return y;
}

// Written so that a NaN in z reaches y and dz, as in torch.
template <class S, Activation A>
struct Act {
  using V = typename S::V;
  using M = typename S::M;
  static constexpr bool has_gate =
      A == Activation::relu || A == Activation::relu6 || A == Activation::leaky_relu;

  static V forward(V z) {
    const V zero = {};
    if constexpr (A == Activation::relu) return S::max(zero, z);
    if constexpr (A == Activation::relu6) return S::min(S::set(6), S::max(zero, z));
    if constexpr (A == Activation::leaky_relu) return z <= zero ? z * S::set(0.01) : z;
    if constexpr (A == Activation::silu) return z / (S::set(1) + vexp(-z));
    if constexpr (A == Activation::gelu) {
      const V u = z * S::set(0.70710678118654752);
      return S::set(0.5) * z * (S::set(1) + verf(u, vexp(-u * u)));
    }
    if constexpr (A == Activation::hardswish) {
      return z * S::min(S::set(6), S::max(zero, z + S::set(3))) * S::set(1.0 / 6);
    }
    return z;
  }

  // Lanes where the derivative is 1.
  static M pass(V z) {
    const M above = S::above(z, V{});
    if constexpr (A == Activation::relu6) return above & S::below(z, S::set(6));
    return above;
  }
  static V masked(V dy, M pass) {
    if constexpr (A == Activation::leaky_relu) return S::select(pass, dy, dy * S::set(0.01));
    return S::keep(pass, dy);
  }

  // dy times the derivative, for those without a gate.
  static V backward(V dy, V z) {
    if constexpr (A == Activation::silu) {
      const V gate = S::set(1) / (S::set(1) + vexp(-z));
      return dy * gate * (S::set(1) + z * (S::set(1) - gate));
    }
    if constexpr (A == Activation::gelu) {
      const V u = z * S::set(0.70710678118654752);
      const V gauss = vexp(-u * u);
      const V phi = S::set(0.5) * (S::set(1) + verf(u, gauss));
      return dy * (phi + z * gauss * S::set(0.39894228040143268));
    }
    // hardswish
    const V inner = z * S::set(1.0 / 3) + S::set(0.5);
    const V low = z <= S::set(-3) ? V{} : inner;
    return dy * (z >= S::set(3) ? S::set(1) : low);
  }
};

}  // namespace batchnorm::BATCHNORM_ISA
