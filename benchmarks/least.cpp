// The least that a program can do which normalises contiguous N,C,*, with ReLU, forward and backward:
// it visits groups of channels as the kernels do, and does the fewest operations that the formulas
// allow. It leaves out what makes results right (the shift against cancellation, sums in float64, a
// coefficient for each channel, the gate of BN+add+ReLU, the ends of rows) and what a layer does
// around it (calls, outputs, autograd); what it writes is of no use. What it takes, kernels of this
// kind take at least.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace {

using V = __m512;

V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
V relu(V z) { return _mm512_max_ps(z, _mm512_setzero_ps()); }
V where_positive(V z, V v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_GT_OQ), v);
}

// Two vectors at a time: load in any order for sums, in the order of memory for what is written.
struct Float {
  using T = float;
  static void load(const T* p, V& a, V& b) { a = _mm512_loadu_ps(p); b = _mm512_loadu_ps(p + 16); }
  static void load_any(const T* p, V& a, V& b) { load(p, a, b); }
  template <bool Stream>
  static void store(T* p, V a, V b) {
    if constexpr (Stream) { _mm512_stream_ps(p, a); _mm512_stream_ps(p + 16, b); }
    else { _mm512_storeu_ps(p, a); _mm512_storeu_ps(p + 16, b); }
  }
};

#ifdef __AVX512BF16__
struct BFloat16 {
  using T = uint16_t;
  static V widen(const T* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void load(const T* p, V& a, V& b) { a = widen(p); b = widen(p + 16); }
  static void load_any(const T* p, V& a, V& b) {
    const __m512i both = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
  }
  template <bool Stream>
  static void store(T* p, V a, V b) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    if constexpr (Stream) _mm512_stream_si512((__m512i*)p, both);
    else _mm512_storeu_si512(p, both);
  }
};
#endif

constexpr int64_t step = 32;  // values

// A group of channels is `length` values in each of `rows`, which are `stride` values apart.
struct Job {
  const void *x, *residual, *dy;
  void *y, *dx, *dz;
  int64_t rows, stride, length;
};

// What is done with the next group while one is written: nothing, it is asked for, or its sums are taken
// and the row behind is asked for.
enum Way { plain, ahead, meanwhile };

struct Sums { V s[4] = {}, q[4] = {}; };
inline float total(const V* v) { return _mm512_reduce_add_ps(v[0] + v[1] + v[2] + v[3]); }

template <class S, bool Add, bool Stream, int How>
struct Program {
  using T = typename S::T;

  static void ask(const T* p, const Job& j) {
    if constexpr (How == plain) return;
    p += How == ahead ? j.length : j.stride;
    for (int64_t i = 0; i < step; i += 64 / (int64_t)sizeof(T))
      _mm_prefetch((const char*)(p + i), _MM_HINT_T1);
  }

  // Adds `step` values to two of the accumulators from u on.
  static void add(const T* x, int u, Sums& t) {
    V a, b;
    S::load_any(x, a, b);
    t.s[u] += a, t.s[u + 1] += b;
    t.q[u] = fma(a, a, t.q[u]), t.q[u + 1] = fma(b, b, t.q[u + 1]);
  }
  static void add(const T* x, const T* dy, V scale, V shift, int u, Sums& t) {
    V a, b, c, d;
    S::load_any(x, a, b);
    S::load_any(dy, c, d);
    c = where_positive(fma(a, scale, shift), c), d = where_positive(fma(b, scale, shift), d);
    t.s[u] += c, t.s[u + 1] += d;
    t.q[u] = fma(c, a, t.q[u]), t.q[u + 1] = fma(d, b, t.q[u + 1]);
  }

  // visit(offset, u): every `step` values of a group, of which u are taken in turn.
  template <class Visit>
  static void each(const Job& j, Visit visit) {
    for (int64_t n = 0; n < j.rows; ++n)
      for (int64_t i = 0; i + step <= j.length; i += step) visit(n * j.stride + i, i / step % 2 * 2);
  }

  // `known` are the sums of this group unless it is the first, and become those of the next.
  static float forward(const Job& j, int64_t group, bool first, bool last, Sums& known) {
    const int64_t from = group * j.length, next = How == meanwhile ? j.length : 0;
    const T *x = (const T*)j.x + from, *residual = (const T*)j.residual + from;
    T* y = (T*)j.y + from;
    Sums t;
    if (How == meanwhile && !first) t = known;
    else each(j, [&](int64_t o, int u) { add(x + o, u, t); });
    const V scale = _mm512_set1_ps(1 + 1e-9f * total(t.q)), shift = _mm512_set1_ps(1e-9f * total(t.s));
    t = {};
    each(j, [&](int64_t o, int u) {
      V a, b, c, d;
      ask(x + o + next, j);
      S::load(x + o, a, b);
      a = fma(a, scale, shift), b = fma(b, scale, shift);
      if constexpr (Add) {
        ask(residual + o, j);
        S::load(residual + o, c, d);
        a += c, b += d;
      }
      S::template store<Stream>(y + o, relu(a), relu(b));
      if (How == meanwhile && !last) add(x + o + next, u, t);
    });
    known = t;
    return scale[0];
  }

  static float backward(const Job& j, int64_t group, bool first, bool last, Sums& known) {
    const int64_t from = group * j.length, next = How == meanwhile ? j.length : 0;
    const T *x = (const T*)j.x + from, *dy = (const T*)j.dy + from;
    T *dx = (T*)j.dx + from, *dz = (T*)j.dz + from;
    const V scale = _mm512_set1_ps(1.5f), shift = _mm512_set1_ps(0.1f);
    Sums t;
    if (How == meanwhile && !first) t = known;
    else each(j, [&](int64_t o, int u) { add(x + o, dy + o, scale, shift, u, t); });
    const V k = _mm512_set1_ps(1e-9f * total(t.q)), m = _mm512_set1_ps(1e-9f * total(t.s));
    t = {};
    each(j, [&](int64_t o, int u) {
      V a, b, c, d;
      ask(x + o + next, j);
      ask(dy + o + next, j);
      S::load(x + o, a, b);
      S::load(dy + o, c, d);
      c = where_positive(fma(a, scale, shift), c), d = where_positive(fma(b, scale, shift), d);
      if constexpr (Add) S::template store<Stream>(dz + o, c, d);
      S::template store<Stream>(dx + o, fma(c, scale, fma(a, k, m)), fma(d, scale, fma(b, k, m)));
      if (How == meanwhile && !last) add(x + o + next, dy + o + next, scale, shift, u, t);
    });
    known = t;
    return k[0];
  }

  static float run(const Job& j, int64_t begin, int64_t end) {
    float kept = 0;
    Sums sums;
    for (int64_t g = begin; g < end; ++g) kept += forward(j, g, g == begin, g + 1 == end, sums);
    for (int64_t g = begin; g < end; ++g) kept += backward(j, g, g == begin, g + 1 == end, sums);
    _mm_sfence();
    return kept;
  }
};

using Run = float (*)(const Job&, int64_t, int64_t);

template <class S, bool Add, bool Stream>
Run choose(int way) {
  const Run all[] = {Program<S, Add, Stream, plain>::run, Program<S, Add, Stream, ahead>::run,
                     Program<S, Add, Stream, meanwhile>::run};
  return all[way];
}
template <class S>
Run choose(bool add, bool stream, int way) {
  if (add) return stream ? choose<S, true, true>(way) : choose<S, true, false>(way);
  return stream ? choose<S, false, true>(way) : choose<S, false, false>(way);
}

}  // namespace

// Seconds of the fastest of `calls` calls by two threads that each take half of the groups. Before
// each, both read and write their half of `between`, as another program would that is timed in turn.
extern "C" double least(const void* x, const void* residual, const void* dy, void* y, void* dx,
                        void* dz, int64_t rows, int64_t stride, int64_t length, int64_t groups,
                        int narrow, int add, int stream, int way, char* between,
                        int64_t between_bytes, int calls) {
  const Job job{x, residual, dy, y, dx, dz, rows, stride, length};
#ifdef __AVX512BF16__
  const Run run = narrow ? choose<BFloat16>(add, stream, way) : choose<Float>(add, stream, way);
#else
  if (narrow) return -1;
  const Run run = choose<Float>(add, stream, way);
#endif
  std::atomic<int> ready{0}, asked{0}, done{0};
  alignas(64) volatile float kept[2][16];
  auto touch = [&](int half) {
    for (int64_t i = half * between_bytes / 2; i < (half + 1) * between_bytes / 2; i += 64) between[i]++;
  };
  // It turns round and round while it waits, so that a call starts at once.
  auto wait = [](const std::atomic<int>& at, int turn) {
    while (at.load(std::memory_order_acquire) < turn) _mm_pause();
  };
  std::thread other([&] {
    for (int turn = 1; turn <= calls; ++turn) {
      touch(1);
      ready.store(turn, std::memory_order_release);
      wait(asked, turn);
      kept[1][0] = run(job, groups / 2, groups);
      done.store(turn, std::memory_order_release);
    }
  });
  double best = 1e9;
  for (int turn = 1; turn <= calls; ++turn) {
    touch(0);
    wait(ready, turn);
    const auto start = std::chrono::steady_clock::now();
    asked.store(turn, std::memory_order_release);
    kept[0][0] = run(job, 0, groups / 2);
    wait(done, turn);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count());
  }
  other.join();
  return best;
}
