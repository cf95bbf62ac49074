// The inner loops. Included once per instruction set.
//
// Planes: runs of neighbouring channels, contiguous, of one length; a channel's coefficients are one
// value each. Columns: rows, a coefficient per element; their arrays are padded to a full vector.
//
// The loops that call a step are always inlined: what the step captures would go through memory.

namespace batchnorm::BATCHNORM_ISA {

struct Sums {
  double dz = 0, dz_d = 0;
  void merge(const Sums& o) { dz += o.dz; dz_d += o.dz_d; }
};

// The coefficients of a channel, rounded once from float64:
//   d = x - m,  z = fma(d, a, b),  dx = a * (dz + fma(d, k, c))
template <class C>
struct Channel {
  C m, a, b, k, c;
  double inverse;  // 1 / sigma
  void forward(const Statistics& s, const Affine& f, int64_t i) {
    inverse = 1 / std::sqrt(s.var[i] + f.eps);
    const double scale = (f.weight ? f.weight[i] : 1.0) * inverse;
    m = (C)s.mean[i];
    a = (C)scale;
    b = (C)((f.bias ? f.bias[i] : 0.0) - (s.mean[i] - (double)m) * scale);
    k = c = 0;
  }
  // dx = a (dz - mean_dz - xhat mean_dz_xhat), xhat = (d - (mean - m)) / sigma
  void backward(const Statistics& s, int64_t i, double mean_dz, double mean_dz_xhat) {
    const double slope = mean_dz_xhat * inverse;
    k = (C)-slope;
    c = (C)((s.mean[i] - (double)m) * slope - mean_dz);
  }
  // sum of dz * xhat from the sum of dz * d.
  double xhat_sum(const Sums& sums, const Statistics& s, int64_t i) const {
    return (sums.dz_d - (s.mean[i] - (double)m) * sums.dz) * inverse;
  }
};

// The same for a row of columns.
template <class C>
struct Coefficients {
  const C *m, *a, *b, *k, *c;
};

// The coefficients as vectors: of one channel, or of the columns from i on.
template <class S>
struct Held {
  explicit Held(const Channel<typename S::C>& v)
      : m(S::set(v.m)), a(S::set(v.a)), b(S::set(v.b)), k(S::set(v.k)), c(S::set(v.c)) {}
  Held(const Coefficients<typename S::C>& p, int64_t i)
      : m(S::load_c(p.m + i)), a(S::load_c(p.a + i)), b(S::load_c(p.b + i)), k(S::load_c(p.k + i)),
        c(S::load_c(p.c + i)) {}
  typename S::V m, a, b, k, c;
};

inline void store_bits(uint8_t* gate, int64_t i, uint32_t bits, int n) {
  const int bytes = (n + 7) / 8;
  if (bytes == 2) std::memcpy(gate + i / 8, &bits, 2);  // little-endian, as every target here
  else gate[i / 8] = (uint8_t)bits;
}
// By one load where n is a constant: GCC does not join two.
template <class N>
inline uint32_t load_bits(const uint8_t* gate, int64_t i, N n) {
  gate += (uint64_t)i / 8;
  uint32_t bits = 0;
  if constexpr (!std::is_same_v<N, int>) {
    std::memcpy(&bits, gate, N::value / 8);
  } else {
    bits = gate[0];
    if (n > 8) bits |= (uint32_t)gate[1] << 8;
  }
  return bits;
}

// Rows of so many bits, each padded to bytes, are joined into one run of bits, or the other way. The
// run has room for eight bytes more than it takes.
constexpr int64_t piece_bits = 56;  // together with a part of a byte they fit a word
inline void join_rows(const uint8_t* rows, uint8_t* run, int64_t len, int64_t count) {
  const uint8_t* end = rows + count * ((len + 7) / 8);
  uint64_t pending = 0;
  int64_t filled = 0;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < len; i += piece_bits) {
      const int64_t bits = std::min(piece_bits, len - i);
      uint64_t piece = 0;
      if (end - rows >= 8) std::memcpy(&piece, rows, 8);  // little-endian, as every target here
      else std::memcpy(&piece, rows, end - rows);
      rows += (bits + 7) / 8;
      pending |= (piece & ((uint64_t(1) << bits) - 1)) << filled;
      std::memcpy(run, &pending, 8);
      filled += bits;
      run += filled / 8;
      pending >>= filled & ~7;
      filled %= 8;
    }
}
inline void pad_rows(const uint8_t* run, uint8_t* rows, int64_t len, int64_t count) {
  const uint8_t* end = rows + count * ((len + 7) / 8);
  int64_t at = 0;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < len; i += piece_bits) {
      const int64_t bits = std::min(piece_bits, len - i);
      uint64_t piece;
      std::memcpy(&piece, run + at / 8, 8);
      piece = piece >> at % 8 & ((uint64_t(1) << bits) - 1);
      at += bits;
      // Of the bytes behind these, those inside are written next.
      if (end - rows >= 8) std::memcpy(rows, &piece, 8);
      else std::memcpy(rows, &piece, end - rows);
      rows += (bits + 7) / 8;
    }
}

// Calls step(i, n) with full vectors of [i, len), then with what is left.
template <int W, class Step>
[[gnu::always_inline]] inline void each_vector(int64_t i, int64_t len, Step step) {
  for (; i + W <= len; i += W) step(i, std::integral_constant<int, W>{});
  if (i < len) step(i, (int)(len - i));
}

// For n: of the next two vectors the elements at even places (0), or those at odd (1).
template <int Odd>
struct Half { static constexpr int odd = Odd; };

template <class S, class T, class N>
inline typename S::V load(const T* p, N n, typename S::C fill = 0) {
  if constexpr (std::is_same_v<N, int>) return S::load_n(p, n, fill);
  else if constexpr (requires { N::odd; }) return S::template load_half<N::odd>(p);
  else return S::load(p);
}
template <class S, class T, class N>
inline void store(T* p, typename S::V v, N n) {
  if constexpr (std::is_same_v<N, int>) S::store_n(p, v, n);
  else S::store(p, v);
}

template <class S, bool Past, class T, class V>
inline void store_four(T* p, V a, V b, V c, V d) {
  if constexpr (requires { &S::template store_four<Past>; })
    return S::template store_four<Past>(p, a, b, c, d);
  S::template store<Past>(p, a);
  S::template store<Past>(p + S::W, b);
  S::template store<Past>(p + 2 * S::W, c);
  S::template store<Past>(p + 3 * S::W, d);
}

template <class T>
inline T* moved(T* p, int64_t by) { return p ? p + by : p; }

// What is written at an element: y, or dx and dz, and the bits of the gate.
template <class V>
struct Written { V first, second; uint32_t bits; };

// Writes four vectors where first and second are not null (the branch is the same for every element).
// The bits of each, stored one after another between the lines of the output, take as long as the rest.
template <class S, bool Gate, class T>
[[gnu::always_inline]] inline void write_four(T* first, T* second, uint8_t* gate, bool past,
                                              const Written<typename S::V> (&v)[4]) {
  auto write = [&](auto p) __attribute__((always_inline)) {
    constexpr bool Past = decltype(p)::value;
    if (second) store_four<S, Past>(second, v[0].second, v[1].second, v[2].second, v[3].second);
    if (first) store_four<S, Past>(first, v[0].first, v[1].first, v[2].first, v[3].first);
  };
  if (past) write(std::true_type{});
  else write(std::false_type{});
  if constexpr (Gate) {
    uint64_t bits = 0;
    for (int u = 0; u < 4; ++u) bits |= (uint64_t)v[u].bits << (u * S::W);
    std::memcpy(gate, &bits, S::W / 2);  // little-endian, as every target here
  }
}

// Writes value(i, n), past the caches if asked to; a line that two runs share is written in the
// ordinary way by both. next(i, n) asks for what comes after elements [i, i + n): a few lines at a time,
// as the processor waits where many are asked for at once.
template <class T, bool Gate, class Value, class Next>
[[gnu::always_inline]] inline void write_run(T* first, T* second, uint8_t* gate, int64_t len, bool past,
                                             Value value, Next next) {
  using S = Simd<T>;
  constexpr int W = S::W, line = 64 / sizeof(T);
  constexpr std::integral_constant<int, W> full;
  auto ordinary = [&](int64_t i, auto n) __attribute__((always_inline)) {
    const auto v = value(i, n);
    if (second) store<S>(second + i, v.second, n);
    if (first) store<S>(first + i, v.first, n);
    if constexpr (Gate) store_bits(gate, i, v.bits & ((1u << n) - 1), n);
  };
  int64_t begin = 0;
  if (past) {
    begin = std::min<int64_t>(len, (-(uintptr_t)(first ? first : second) & 63) / sizeof(T));
    each_vector<W>(0, begin, ordinary);
  }
  for (; begin + 4 * W <= len; begin += 4 * W) {
    next(begin, 4 * W);
    const Written<typename S::V> v[] = {value(begin, full), value(begin + W, full),
                                        value(begin + 2 * W, full), value(begin + 3 * W, full)};
    write_four<S, Gate>(moved(first, begin), moved(second, begin), moved(gate, begin / 8), past, v);
  }
  next(begin, len - begin);
  if (past)
    for (; begin + line <= len; begin += line)
      for (int64_t i = begin; i < begin + line; i += W) {
        const auto v = value(i, full);
        if (second) S::template store<true>(second + i, v.second);
        if (first) S::template store<true>(first + i, v.first);
        if constexpr (Gate) store_bits(gate, i, v.bits, W);
      }
  each_vector<W>(begin, len, ordinary);
}

// Rows of `len` elements, ld apart, and their gates.
struct Rows {
  int64_t count, len, ld, gate_ld;
};

// The same for rows: value_of(row)(i, n, coefficients), next(row, i, n). The coefficients of four
// vectors of columns stay in registers for all rows.
template <class T, bool Gate, class ValueOf, class Next>
[[gnu::always_inline]] inline void write_rows(T* first, T* second, uint8_t* gate, const Rows& k,
                                              bool past, const Coefficients<typename Simd<T>::C>& p,
                                              ValueOf value_of, Next next) {
  using S = Simd<T>;
  constexpr int W = S::W;
  constexpr std::integral_constant<int, W> full;
  const uintptr_t starts = (uintptr_t)first | (uintptr_t)second | (uintptr_t)(k.ld * sizeof(T));
  int64_t begin = 0;
  if (k.count > 1 && (!past || starts % 64 == 0))
    for (; begin + 4 * W <= k.len; begin += 4 * W) {
      const Held<S> held[] = {{p, begin}, {p, begin + W}, {p, begin + 2 * W}, {p, begin + 3 * W}};
      for (int64_t row = 0; row < k.count; ++row) {
        const int64_t o = row * k.ld + begin;
        const auto value = value_of(row);
        next(row, begin, 4 * W);
        const Written<typename S::V> v[] = {
            value(begin, full, held[0]), value(begin + W, full, held[1]),
            value(begin + 2 * W, full, held[2]), value(begin + 3 * W, full, held[3])};
        write_four<S, Gate>(moved(first, o), moved(second, o),
                            moved(gate, row * k.gate_ld + begin / 8), past, v);
      }
    }
  if (begin < k.len)
    for (int64_t row = 0; row < k.count; ++row) {
      const int64_t o = row * k.ld + begin;
      const auto value = value_of(row);
      write_run<T, Gate>(
          moved(first, o), moved(second, o), moved(gate, row * k.gate_ld + begin / 8), k.len - begin,
          past,
          [&](int64_t i, auto n) __attribute__((always_inline)) {
            return value(begin + i, n, Held<S>(p, begin + i));
          },
          [&](int64_t i, int64_t n) __attribute__((always_inline)) { next(row, begin + i, n); });
    }
}

// Sums of one channel: float lanes over a block, the block into float64. Two accumulators each hide
// the latency; more would have to be loaded and stored for every short row.
template <class S>
struct Lanes {
  typename S::V s[2] = {}, q[2] = {};
  void drain(double& sum, double& square) const {
    sum += S::sum(s[0] + s[1]);
    square += S::sum(q[0] + q[1]);
  }
};

// The gradient dy where the activation passes it.
template <class S, Activation A, class T, class N>
inline typename S::V passed(const T* dy, typename S::M pass, N n) {
  if constexpr (std::is_same_v<N, int> || A == Activation::leaky_relu ||
                !requires { &S::load_where; })
    return Act<S, A>::masked(load<S>(dy, n), pass);
  else if constexpr (requires { N::odd; }) return S::template load_half_where<N::odd>(pass, dy);
  else return S::load_where(pass, dy);
}

// The gradient dy through the activation at z, found as P says.
template <class S, Activation A, Preactivation P, class T, class N>
inline typename S::V gradient(const T* dy, typename S::V d, const T* r, const uint8_t* gate,
                              const Held<S>& of, int64_t i, N n) {
  if constexpr (A == Activation::none) return load<S>(dy + i, n);
  else if constexpr (P == Preactivation::from_gate) {
    return passed<S, A>(dy + i, S::mask(load_bits(gate, i, n)), n);
  } else {
    auto z = S::fma(d, of.a, of.b);
    if constexpr (P == Preactivation::from_residual) z += load<S>(r + i, n);
    if constexpr (Act<S, A>::has_gate) return passed<S, A>(dy + i, Act<S, A>::pass(z), n);
    else return Act<S, A>::backward(load<S>(dy + i, n), z);
  }
}

// step(i, n, s, q) adds elements [i, i + n) of a row to accumulators. Where the order of elements is
// free, halves may be cheaper to load.
template <bool Halves, class S, class Step>
[[gnu::always_inline]] inline void accumulate_four(int64_t i, Lanes<S>& l, const Step& step) {
  constexpr int W = S::W;
  constexpr std::integral_constant<int, W> full;
  if constexpr (Halves && requires { &S::template load_half<0>; }) {
    step(i, Half<0>{}, l.s[0], l.q[0]);
    step(i, Half<1>{}, l.s[1], l.q[1]);
    step(i + 2 * W, Half<0>{}, l.s[0], l.q[0]);
    step(i + 2 * W, Half<1>{}, l.s[1], l.q[1]);
  } else {
    step(i, full, l.s[0], l.q[0]);
    step(i + W, full, l.s[1], l.q[1]);
    step(i + 2 * W, full, l.s[0], l.q[0]);
    step(i + 3 * W, full, l.s[1], l.q[1]);
  }
}
// Elements [i, len), the last of a row.
template <bool Halves, class S, class Step>
[[gnu::always_inline]] inline void accumulate_rest(int64_t i, int64_t len, Lanes<S>& l,
                                                   const Step& step) {
  constexpr int W = S::W;
  constexpr std::integral_constant<int, W> full;
  for (; i + 4 * W <= len; i += 4 * W) accumulate_four<Halves>(i, l, step);
  if (i + W <= len) { step(i, full, l.s[0], l.q[0]); i += W; }
  if (i + W <= len) { step(i, full, l.s[1], l.q[1]); i += W; }
  if (i + W <= len) { step(i, full, l.s[0], l.q[0]); i += W; }
  if (i < len) step(i, (int)(len - i), l.s[1], l.q[1]);
}
// Rows of one channel, step_of(row) each. The accumulators are a copy, as nothing else may alias what
// is to stay in registers.
template <bool Halves, class S, class StepOf>
[[gnu::always_inline]] inline void accumulate(int64_t rows, int64_t len, Lanes<S>& lanes,
                                              StepOf step_of) {
  Lanes<S> l = lanes;
  for (int64_t r = 0; r < rows; ++r) accumulate_rest<Halves>(0, len, l, step_of(r));
  lanes = l;
}

template <class T>
[[gnu::always_inline]] inline auto moments_step(const T* x, typename Simd<T>::C shift) {
  using S = Simd<T>;
  return [=, k = S::set(shift)](int64_t i, auto n, auto& s, auto& q) __attribute__((always_inline)) {
    const auto d = load<S>(x + i, n, shift) - k;
    s += d;
    q = S::fma(d, d, q);
  };
}
template <class T, Activation A, Preactivation P>
[[gnu::always_inline]] inline auto sums_step(const T* dy, const T* x, const T* r, const uint8_t* gate,
                                             const Held<Simd<T>>& of, typename Simd<T>::C m) {
  using S = Simd<T>;
  return [=, &of](int64_t i, auto n, auto& s, auto& q) __attribute__((always_inline)) {
    const auto d = load<S>(x + i, n, m) - of.m;
    const auto dz = gradient<S, A, P>(dy, d, r, gate, of, i, n);
    s += dz;
    q = S::fma(dz, d, q);
  };
}
template <Preactivation P>
constexpr bool any_order = P != Preactivation::from_gate;  // whose bits are in order

// Rows of one channel, ld elements apart.
template <class T>
inline void moments_run(const T* x, int64_t rows, int64_t ld, int64_t len,
                        typename Simd<T>::C shift, Lanes<Simd<T>>& lanes) {
  accumulate<true>(rows, len, lanes, [&](int64_t row) { return moments_step(x + row * ld, shift); });
}

template <class T, Activation A, Preactivation P>
inline void sums_run(const T* dy, const T* x, const T* r, const uint8_t* gate, int64_t rows,
                     int64_t ld, int64_t gate_ld, int64_t len,
                     const Channel<typename Simd<T>::C>& channel, Lanes<Simd<T>>& lanes) {
  const Held<Simd<T>> of(channel);
  accumulate<any_order<P>>(rows, len, lanes, [&](int64_t row) {
    const int64_t o = row * ld;
    return sums_step<T, A, P>(dy + o, x + o, moved(r, o), moved(gate, row * gate_ld), of, channel.m);
  });
}

// What is done with later runs while one is written, so that memory is never left idle: they are
// asked for, and the sums of those that come next are taken.
template <class S>
struct Following {
  int64_t ahead = 0;    // so many elements further on they are asked for; 0: not at all
  int64_t by = 0;       // those whose sums are taken are so many elements further on,
  int64_t gate_by = 0;  // their gates so many bytes,
  int64_t count = 0;    // for so many of the runs that are written together
  const Channel<typename S::C>* channels = nullptr;  // theirs; in the forward m is the shift
  Lanes<S>* lanes = nullptr;
};
// Takes the sums of a run while another is written: next(i, n) of write_run, from element `at` on.
template <bool Halves, class S, class Step>
[[gnu::always_inline]] inline void accumulate_next(int64_t& at, int64_t n, int64_t len, Lanes<S>& l,
                                                   const Step& step) {
  if (n == 4 * S::W) {
    accumulate_four<Halves>(at, l, step);
    at += n;
  } else {
    accumulate_rest<Halves>(at, len, l, step);
  }
}

// Whether the registers have room for the sums of the next run: not beside an exp, nor, where there are
// sixteen, beside what widens and rounds, nor in the baseline, whose vectors take several registers.
#if defined(__AVX512F__)
constexpr int64_t least_light_bytes = 2;
#elif defined(__AVX2__)
constexpr int64_t least_light_bytes = 4;
#else
constexpr int64_t least_light_bytes = 16;
#endif
template <class T, Activation A>
constexpr bool is_light = sizeof(T) >= least_light_bytes &&
                          (A == Activation::none || Act<Simd<T>, A>::has_gate);

template <class T, Activation A, bool Residual>
[[gnu::always_inline]] inline auto normalized(const T* x, const T* r) {
  using S = Simd<T>;
  return [=](int64_t i, auto n, const Held<S>& of) __attribute__((always_inline)) {
    auto z = S::fma(load<S>(x + i, n) - of.m, of.a, of.b);
    if constexpr (Residual) z += load<S>(r + i, n);
    return Written<typename S::V>{Act<S, A>::forward(z), z, S::bits(Act<S, A>::pass(z))};
  };
}
template <class T, Activation A, Preactivation P>
[[gnu::always_inline]] inline auto gradients(const T* dy, const T* x, const T* r,
                                             const uint8_t* gate) {
  using S = Simd<T>;
  return [=](int64_t i, auto n, const Held<S>& of) __attribute__((always_inline)) {
    const auto d = load<S>(x + i, n) - of.m;
    const auto dz = gradient<S, A, P>(dy, d, r, gate, of, i, n);
    return Written<typename S::V>{of.a * (dz + S::fma(d, of.k, of.c)), dz, 0};
  };
}

// Also: `run` is one of several that are written together, each with the sums of one further on.
template <class T, Activation A, bool Residual, bool Gate, bool Also>
[[gnu::always_inline]] inline void normalize_run(const T* x, const T* r, T* y, uint8_t* gate,
                                                 int64_t len, const Held<Simd<T>>& of,
                                                 const Following<Simd<T>>& f, int64_t run,
                                                 bool past) {
  using S = Simd<T>;
  const bool also = Also && run < f.count;
  const int64_t ahead = f.ahead, by = f.by;
  const auto step = moments_step(x + by, also ? f.channels[run].m : 0);
  Lanes<S> lanes;
  if (also) lanes = f.lanes[run];
  int64_t at = 0;
  const auto value = normalized<T, A, Residual>(x, r);
  write_run<T, Gate>(y, (T*)nullptr, gate, len, past, [&](int64_t i, auto n) __attribute__((always_inline)) {
    return value(i, n, of);
  }, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    if (ahead) {
      fetch(x + i + by + ahead, n * sizeof(T));
      if constexpr (Residual) fetch(r + i + ahead, n * sizeof(T));
    }
    if (also) accumulate_next<true>(at, n, len, lanes, step);
  });
  if (also) f.lanes[run] = lanes;
}

template <class T, Activation A, Preactivation P, bool Also>
[[gnu::always_inline]] inline void apply_run(const T* dy, const T* x, const T* r, const uint8_t* gate,
                                             T* dx, T* dz, int64_t len,
                                             const Held<Simd<T>>& of,
                                             const Following<Simd<T>>& f, int64_t run, bool past) {
  using S = Simd<T>;
  const bool also = Also && run < f.count;
  const int64_t ahead = f.ahead, by = f.by;
  const Channel<typename S::C> channel = also ? f.channels[run] : Channel<typename S::C>{};
  const Held<S> next(channel);
  const auto step = sums_step<T, A, P>(dy + by, x + by, moved(r, by), moved(gate, f.gate_by), next,
                                       channel.m);
  Lanes<S> lanes;
  if (also) lanes = f.lanes[run];
  int64_t at = 0;
  const auto value = gradients<T, A, P>(dy, x, r, gate);
  write_run<T, false>(dx, dz, nullptr, len, past, [&](int64_t i, auto n) __attribute__((always_inline)) {
    return value(i, n, of);
  }, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    if (ahead) {
      fetch(x + i + by + ahead, n * sizeof(T));
      fetch(dy + i + by + ahead, n * sizeof(T));
    }
    if (also) accumulate_next<any_order<P>>(at, n, len, lanes, step);
  });
  if (also) f.lanes[run] = lanes;
}

// Sums of many channels: rows in groups of at most Rows, so that each accumulator is loaded and
// stored once a group. A group is as many streams as rows, too short for the processor to see them
// coming: ahead(row, j) asks for the next group's lines.
template <int Rows, class S, class Step, class Ahead>
[[gnu::always_inline]] inline void accumulate_columns(int64_t rows, int64_t width,
                                                      typename S::C* s, typename S::C* q,
                                                      Step step, Ahead ahead) {
  auto group = [&](int64_t row, auto count) {
    each_vector<S::W>(0, width, [&](int64_t j, auto n) {
      if (j % (2 * S::W) == 0)
        for (int u = 0; u < count; ++u) ahead(row + Rows + u, j);
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
  }, [&](int64_t row, int64_t j) { fetch(x + row * ld + j, 1); });
}

template <class T, Activation A, Preactivation P>
void sums_columns(const T* dy, const T* x, const T* r, const uint8_t* gate, int64_t ld,
                  int64_t gate_ld, int64_t rows, int64_t width,
                  Coefficients<typename Simd<T>::C> p,
                  typename Simd<T>::C* s, typename Simd<T>::C* q) {
  using S = Simd<T>;
  accumulate_columns<4, S>(rows, width, s, q, [&](int64_t row, int64_t j, auto n, auto& vs, auto& vq) {
    const int64_t o = row * ld;
    const Held<S> held(p, j);
    const auto d = load<S>(x + o + j, n) - held.m;
    const auto dz =
        gradient<S, A, P>(dy + o, d, moved(r, o), moved(gate, row * gate_ld), held, j, n);
    vs += dz;
    vq = S::fma(dz, d, vq);
  }, [&](int64_t row, int64_t j) {
    fetch(x + row * ld + j, 1);
    fetch(dy + row * ld + j, 1);
  });
}

// The loops of one type, activation and source of z, behind pointers: the drivers are compiled
// once per type. In planes, `runs` runs of neighbouring channels, each with its row of the gate.
template <class T>
struct ForwardLoops {
  using S = Simd<T>;
  using C = typename S::C;
  using Planes = void(const T* x, const T* r, T* y, uint8_t* gate, int64_t len, int64_t gate_row,
                      int64_t runs, const Channel<C>* channels, const Following<S>&, bool past);
  using Columns = void(const T* x, const T* r, T* y, uint8_t* gate, const Rows&, Coefficients<C>,
                       int64_t ahead, bool past);
  Planes* planes;
  Columns* columns;
  bool gate, also;

  template <Activation A, bool Residual, bool Gate>
  static void in_planes(const T* x, const T* r, T* y, uint8_t* gate, int64_t len, int64_t gate_row,
                        int64_t runs, const Channel<C>* channels, const Following<S>& f, bool past) {
    for (int64_t c = 0, o = 0; c < runs; ++c, o += len)
      normalize_run<T, A, Residual, Gate, is_light<T, A>>(x + o, moved(r, o), y + o,
                                                          moved(gate, c * gate_row), len,
                                                          Held<S>(channels[c]), f, c, past);
  }
  template <Activation A, bool Residual, bool Gate>
  static void in_columns(const T* x, const T* r, T* y, uint8_t* gate, const Rows& k,
                         Coefficients<C> p, int64_t ahead, bool past) {
    write_rows<T, Gate>(
        y, (T*)nullptr, gate, k, past, p,
        [&](int64_t row) { return normalized<T, A, Residual>(x + row * k.ld, moved(r, row * k.ld)); },
        [&](int64_t row, int64_t i, int64_t n) __attribute__((always_inline)) {
          if (!ahead) return;
          fetch(x + row * k.ld + i + ahead, n * sizeof(T));
          if constexpr (Residual) fetch(r + row * k.ld + i + ahead, n * sizeof(T));
        });
  }
  template <Activation A, bool Residual, bool Gate>
  static ForwardLoops of() {
    return {in_planes<A, Residual, Gate>, in_columns<A, Residual, Gate>, Gate, is_light<T, A>};
  }
};

template <class T>
struct BackwardLoops {
  using S = Simd<T>;
  using C = typename S::C;
  using Sums = void(const T* dy, const T* x, const T* r, const uint8_t* gate, int64_t rows,
                    int64_t len, int64_t gate_row, int64_t runs, int64_t ld, int64_t neighbours,
                    const Channel<C>*, Lanes<S>*);
  using ColumnSums = void(const T*, const T*, const T*, const uint8_t*, int64_t, int64_t, int64_t,
                          int64_t, Coefficients<C>, C*, C*);
  using Planes = void(const T* dy, const T* x, const T* r, const uint8_t* gate, T* dx, T* dz,
                      int64_t len, int64_t gate_row, int64_t runs, const Channel<C>*,
                      const Following<S>&, bool past);
  using Columns = void(const T* dy, const T* x, const T* r, const uint8_t* gate, T* dx, T* dz,
                       const Rows&, Coefficients<C>, int64_t ahead, bool past);
  Sums* sums;
  ColumnSums* column_sums;
  Planes* planes;
  Columns* columns;
  bool residual, gate, also;

  template <Activation A, Preactivation P>
  static constexpr bool takes_sums = is_light<T, A> && P != Preactivation::from_residual;

  // The runs are ld elements apart: where a block is part of a row, more than their length. Of each
  // there are some rows, as many runs apart as there are channels.
  template <Activation A, Preactivation P>
  static void sums_in_planes(const T* dy, const T* x, const T* r, const uint8_t* gate, int64_t rows,
                             int64_t len, int64_t gate_row, int64_t runs, int64_t ld,
                             int64_t neighbours, const Channel<C>* channels, Lanes<S>* lanes) {
    for (int64_t c = 0, o = 0; c < runs; ++c, o += ld)
      sums_run<T, A, P>(dy + o, x + o, moved(r, o), moved(gate, c * gate_row), rows,
                        neighbours * ld, neighbours * gate_row, len, channels[c], lanes[c]);
  }
  template <Activation A, Preactivation P>
  static void in_planes(const T* dy, const T* x, const T* r, const uint8_t* gate, T* dx, T* dz,
                        int64_t len, int64_t gate_row, int64_t runs, const Channel<C>* channels,
                        const Following<S>& f, bool past) {
    for (int64_t c = 0, o = 0; c < runs; ++c, o += len)
      apply_run<T, A, P, takes_sums<A, P>>(dy + o, x + o, moved(r, o), moved(gate, c * gate_row),
                                           moved(dx, o), moved(dz, o), len,
                                           Held<S>(channels[c]), f, c, past);
  }
  template <Activation A, Preactivation P>
  static void in_columns(const T* dy, const T* x, const T* r, const uint8_t* gate, T* dx, T* dz,
                         const Rows& k, Coefficients<C> p, int64_t ahead, bool past) {
    write_rows<T, false>(
        dx, dz, nullptr, k, past, p,
        [&](int64_t row) {
          const int64_t o = row * k.ld;
          return gradients<T, A, P>(dy + o, x + o, moved(r, o), moved(gate, row * k.gate_ld));
        },
        [&](int64_t row, int64_t i, int64_t n) __attribute__((always_inline)) {
          if (!ahead) return;
          fetch(x + row * k.ld + i + ahead, n * sizeof(T));
          fetch(dy + row * k.ld + i + ahead, n * sizeof(T));
        });
  }
  template <Activation A, Preactivation P>
  static BackwardLoops of() {
    return {sums_in_planes<A, P>,
            sums_columns<T, A, P>,
            in_planes<A, P>,
            in_columns<A, P>,
            P == Preactivation::from_residual,
            P == Preactivation::from_gate,
            takes_sums<A, P>};
  }
};

}  // namespace batchnorm::BATCHNORM_ISA
