// The inner loops, over runs of contiguous elements. Included once per instruction set.
//
// Coefficients are one value per run in planes and one per element in columns (Columns = true);
// their arrays are padded to a full vector.

namespace batchnorm::BATCHNORM_ISA {

template <class C>
struct Coefficients {
  const C* m;  // d = x - m
  const C* a;  // z = fma(d, a, b)
  const C* b;
  const C* k;  // dx = a * (dz + fma(d, k, c))
  const C* c;
};

template <class S, bool Columns>
inline typename S::V at(const typename S::C* p, int64_t i) {
  if constexpr (Columns) return S::load_c(p + i);
  else return S::set(*p);
}

inline void store_bits(uint8_t* gate, int64_t i, uint32_t bits, int n) {
  const int bytes = (n + 7) / 8;
  if (bytes == 2) std::memcpy(gate + i / 8, &bits, 2);  // little-endian, as every target here
  else gate[i / 8] = (uint8_t)bits;
}
inline uint32_t load_bits(const uint8_t* gate, int64_t i, int n) {
  uint32_t bits = gate[i / 8];
  if (n > 8) bits |= (uint32_t)gate[i / 8 + 1] << 8;
  return bits;
}

// Calls step(i, n) with full vectors, then with what is left.
template <int W, class Step>
inline void each_vector(int64_t len, Step step) {
  int64_t i = 0;
  for (; i + W <= len; i += W) step(i, std::integral_constant<int, W>{});
  if (i < len) step(i, (int)(len - i));
}
template <int W>
inline constexpr bool is_full(std::integral_constant<int, W>) { return true; }
inline constexpr bool is_full(int) { return false; }

template <class S, class T, class N>
inline typename S::V load(const T* p, N n, typename S::C fill = 0) {
  if constexpr (std::is_same_v<N, int>) return S::load_n(p, n, fill);
  else return S::load(p);
}
template <class S, class T, class N>
inline void store(T* p, typename S::V v, N n) {
  if constexpr (std::is_same_v<N, int>) S::store_n(p, v, n);
  else S::store(p, v);
}

template <class T, Activation A, bool Columns, bool Residual, bool Gate>
void normalize_run(const T* x, const T* r, T* y, uint8_t* gate, int64_t len,
                   Coefficients<typename Simd<T>::C> p) {
  using S = Simd<T>;
  each_vector<S::W>(len, [&](int64_t i, auto n) {
    auto z = S::fma(load<S>(x + i, n) - at<S, Columns>(p.m, i), at<S, Columns>(p.a, i),
                    at<S, Columns>(p.b, i));
    if constexpr (Residual) z += load<S>(r + i, n);
    if constexpr (Gate) store_bits(gate, i, S::bits(Act<S, A>::pass(z)) & ((1u << n) - 1), n);
    store<S>(y + i, Act<S, A>::forward(z), n);
  });
}

// The derivative at z, found as P says.
template <class S, Activation A, Preactivation P, bool Columns, class T, class N>
inline typename S::V gradient(typename S::V dy, typename S::V d, const T* r, const uint8_t* gate,
                              const Coefficients<typename S::C>& p, int64_t i, N n) {
  if constexpr (A == Activation::none) return dy;
  else if constexpr (P == Preactivation::from_gate) {
    return Act<S, A>::masked(dy, S::mask(load_bits(gate, i, n)));
  } else {
    auto z = S::fma(d, at<S, Columns>(p.a, i), at<S, Columns>(p.b, i));
    if constexpr (P == Preactivation::from_residual) z += load<S>(r + i, n);
    return Act<S, A>::backward(dy, z);
  }
}

// Either output may be null: the branch is the same for every element.
template <class T, Activation A, Preactivation P, bool Columns>
void apply_run(const T* dy, const T* x, const T* r, const uint8_t* gate, T* dx, T* dz_out, int64_t len,
               Coefficients<typename Simd<T>::C> p) {
  using S = Simd<T>;
  each_vector<S::W>(len, [&](int64_t i, auto n) {
    const auto d = load<S>(x + i, n) - at<S, Columns>(p.m, i);
    const auto dz = gradient<S, A, P, Columns>(load<S>(dy + i, n), d, r, gate, p, i, n);
    if (dz_out) store<S>(dz_out + i, dz, n);
    if (dx) {
      const auto inner = S::fma(d, at<S, Columns>(p.k, i), at<S, Columns>(p.c, i));
      store<S>(dx + i, at<S, Columns>(p.a, i) * (dz + inner), n);
    }
  });
}

// Sums of one channel: float lanes over a block, the block into float64.
template <class S>
struct Lanes {
  typename S::V s[4] = {}, q[4] = {};
  void drain(double& sum, double& square) const {
    sum += S::sum((s[0] + s[1]) + (s[2] + s[3]));
    square += S::sum((q[0] + q[1]) + (q[2] + q[3]));
  }
};

// step(i, n, s, q) adds elements [i, i + n) to the accumulators; four of them hide the latency.
template <class S, class Step>
inline void accumulate(int64_t len, Lanes<S>& l, Step step) {
  constexpr int W = S::W;
  constexpr std::integral_constant<int, W> full;
  int64_t i = 0;
  for (; i + 4 * W <= len; i += 4 * W) {
    step(i, full, l.s[0], l.q[0]);
    step(i + W, full, l.s[1], l.q[1]);
    step(i + 2 * W, full, l.s[2], l.q[2]);
    step(i + 3 * W, full, l.s[3], l.q[3]);
  }
  if (i + W <= len) { step(i, full, l.s[0], l.q[0]); i += W; }
  if (i + W <= len) { step(i, full, l.s[1], l.q[1]); i += W; }
  if (i + W <= len) { step(i, full, l.s[2], l.q[2]); i += W; }
  if (i < len) step(i, (int)(len - i), l.s[3], l.q[3]);
}

template <class T>
inline void moments_run(const T* x, int64_t len, typename Simd<T>::C shift, Lanes<Simd<T>>& lanes) {
  using S = Simd<T>;
  const auto k = S::set(shift);
  accumulate<S>(len, lanes, [&](int64_t i, auto n, auto& s, auto& q) {
    const auto d = load<S>(x + i, n, shift) - k;
    s += d;
    q = S::fma(d, d, q);
  });
}

template <class T, Activation A, Preactivation P>
void sums_run(const T* dy, const T* x, const T* r, const uint8_t* gate, int64_t len,
              Coefficients<typename Simd<T>::C> p,
              Lanes<Simd<T>>& lanes) {
  using S = Simd<T>;
  const auto m = S::set(*p.m);
  accumulate<S>(len, lanes, [&](int64_t i, auto n, auto& s, auto& q) {
    const auto d = load<S>(x + i, n, *p.m) - m;
    const auto dz =
        gradient<S, A, P, false>(load<S>(dy + i, n), d, r, gate, p, i, n);
    s += dz;
    q = S::fma(dz, d, q);
  });
}

// Sums of many channels: rows in groups of at most Rows, so that each accumulator is loaded and
// stored once a group.
template <int Rows, class S, class Step>
inline void accumulate_columns(int64_t rows, int64_t width, typename S::C* s, typename S::C* q,
                               Step step) {
  auto group = [&](int64_t row, auto count) {
    each_vector<S::W>(width, [&](int64_t j, auto n) {
      auto vs = S::load_c(s + j), vq = S::load_c(q + j);
      for (int u = 0; u < count; ++u) step(row + u, j, n, vs, vq);
      S::store_c(s + j, vs);
      S::store_c(q + j, vq);
    });
  };
  int64_t row = 0;
  for (; row + Rows <= rows; row += Rows) group(row, std::integral_constant<int, Rows>{});
  if (row < rows) group(row, (int)(rows - row));
}

template <class T>
inline void moments_columns(const T* x, int64_t ld, int64_t rows, int64_t width,
                            const typename Simd<T>::C* shift, typename Simd<T>::C* s,
                            typename Simd<T>::C* q) {
  using S = Simd<T>;
  accumulate_columns<8, S>(rows, width, s, q, [&](int64_t row, int64_t j, auto n, auto& vs, auto& vq) {
    const auto d = load<S>(x + row * ld + j, n) - S::load_c(shift + j);
    vs += d;
    vq = S::fma(d, d, vq);
  });
}

template <class T, Activation A, Preactivation P>
void sums_columns(const T* dy, const T* x, const T* r, const uint8_t* gate, int64_t ld,
                  int64_t gate_ld, int64_t rows, int64_t width,
                  Coefficients<typename Simd<T>::C> p,
                  typename Simd<T>::C* s, typename Simd<T>::C* q) {
  using S = Simd<T>;
  accumulate_columns<4, S>(rows, width, s, q, [&](int64_t row, int64_t j, auto n, auto& vs, auto& vq) {
    const int64_t o = row * ld;
    const auto d = load<S>(x + o + j, n) - S::load_c(p.m + j);
    const auto dz = gradient<S, A, P, true>(load<S>(dy + o + j, n), d,
                                            r ? r + o : r, gate ? gate + row * gate_ld : gate, p, j,
                                            n);
    vs += dz;
    vq = S::fma(dz, d, vq);
  });
}

// The loops of one type, activation and source of z, behind pointers: the drivers are compiled
// once per type.
template <class T>
struct ForwardLoops {
  using C = typename Simd<T>::C;
  using Run = void(const T*, const T*, T*, uint8_t*, int64_t, Coefficients<C>);
  Run *planes, *columns;
  bool residual, gate;

  template <Activation A, bool Residual, bool Gate>
  static ForwardLoops of() {
    return {normalize_run<T, A, false, Residual, Gate>, normalize_run<T, A, true, Residual, Gate>,
            Residual, Gate};
  }
};

template <class T>
struct BackwardLoops {
  using S = Simd<T>;
  using C = typename S::C;
  using Sums = void(const T*, const T*, const T*, const uint8_t*, int64_t, Coefficients<C>,
                    Lanes<S>&);
  using ColumnSums = void(const T*, const T*, const T*, const uint8_t*, int64_t, int64_t, int64_t,
                          int64_t, Coefficients<C>, C*, C*);
  using Apply = void(const T*, const T*, const T*, const uint8_t*, T*, T*, int64_t,
                     Coefficients<C>);
  Sums* sums;
  ColumnSums* column_sums;
  Apply *planes, *columns;
  bool residual, gate;

  template <Activation A, Preactivation P>
  static BackwardLoops of() {
    return {sums_run<T, A, P>, sums_columns<T, A, P>, apply_run<T, A, P, false>,
            apply_run<T, A, P, true>, P == Preactivation::from_residual,
            P == Preactivation::from_gate};
  }
};

}  // namespace batchnorm::BATCHNORM_ISA
