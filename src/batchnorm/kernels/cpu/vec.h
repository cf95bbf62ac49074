// Thin vectors: a fixed number of lanes of float or double and the few operations the kernels use.
// Written in the compiler's vector extension, which every target lowers (SSE2, NEON, ...);
// intrinsics only where the extension has no word for it. Included once per instruction set, inside
// the namespace BATCHNORM_ISA, so that no inline function is shared between sets.
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace batchnorm::BATCHNORM_ISA {

#if defined(__AVX512F__)
constexpr int float_lanes = 16;
#else
constexpr int float_lanes = 8;
#endif
constexpr int double_lanes = 8;

#if defined(__AVX512F__)
// For the forms with a mask: GCC 12 warns that those without use a value that was never set.
constexpr __mmask16 all_lanes = 0xffff;
#endif

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

typedef float vfloat __attribute__((vector_size(4 * float_lanes)));
typedef int32_t vint __attribute__((vector_size(4 * float_lanes)));
typedef uint32_t vuint __attribute__((vector_size(4 * float_lanes)));
typedef uint16_t vu16 __attribute__((vector_size(2 * float_lanes)));
typedef double vdouble __attribute__((vector_size(8 * double_lanes)));
typedef int64_t vlong __attribute__((vector_size(8 * double_lanes)));

// Lane sums in a fixed order.
template <class V, class E>
inline double lane_sum(const V& v, int lanes) {
  E lane[64 / sizeof(E)];
  std::memcpy(lane, &v, sizeof v);
  double sum = 0;
  for (int i = 0; i < lanes; ++i) sum += lane[i];
  return sum;
}

#if defined(__x86_64__)
// Stores past the caches; p lies on a boundary of the vector's size.
template <class V>
inline void stream(void* p, const V& v) {
#if defined(__AVX512F__)
  constexpr size_t widest = 64;
#elif defined(__AVX2__)
  constexpr size_t widest = 32;
#else
  constexpr size_t widest = 16;
#endif
  constexpr size_t size = sizeof v < widest ? sizeof v : widest;
  for (size_t i = 0; i < sizeof v; i += size) {
    char* to = (char*)p + i;
    const char* from = (const char*)&v + i;
#if defined(__AVX512F__)
    if constexpr (size == 64) {
      _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
      continue;
    }
#endif
#if defined(__AVX2__)
    if constexpr (size == 32) {
      _mm256_stream_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
      continue;
    }
#endif
    if constexpr (size == 16) _mm_stream_si128((__m128i*)to, _mm_loadu_si128((const __m128i*)from));
  }
}
#endif

// Stores a vector. Past: past the caches, on lines only, since an ordinary store first reads the line
// that it overwrites, one more pass over the output.
template <bool Past, class V>
inline void put(void* p, V v) {
#if defined(__x86_64__)
  if constexpr (Past) return stream(p, v);
#endif
  std::memcpy(p, &v, sizeof v);
}

// A mask M has a bit, or a lane of zeros or ones, per lane. above(a, b) is not a <= b, and below(a, b)
// not a >= b, so that a NaN is both; max and min have b where either is NaN.
struct OfFloat {
  using C = float;
  using V = vfloat;
  static constexpr int W = float_lanes;
  static V set(float x) { return x - V{}; }
  static V load_c(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
  static void store_c(float* p, V v) { std::memcpy(p, &v, sizeof v); }
  static double sum(V v) { return lane_sum<V, float>(v, W); }
#if defined(__AVX512F__)
  using M = __mmask16;
  static V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  static V max(V a, V b) { return (V)_mm512_maskz_max_ps(all_lanes, (__m512)a, (__m512)b); }
  static V min(V a, V b) { return (V)_mm512_maskz_min_ps(all_lanes, (__m512)a, (__m512)b); }
  static M above(V a, V b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ); }
  static M below(V a, V b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NGE_UQ); }
  static V select(M m, V a, V b) { return (V)_mm512_mask_mov_ps((__m512)b, m, (__m512)a); }
  static V keep(M m, V a) { return (V)_mm512_maskz_mov_ps(m, (__m512)a); }
  static uint32_t bits(M m) { return m; }
  static M mask(uint32_t bits) { return (M)bits; }
#elif defined(__AVX2__)
  using M = vint;
  static V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  static V max(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
  static V min(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
  static M above(V a, V b) { return (M)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ); }
  static M below(V a, V b) { return (M)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NGE_UQ); }
  static V select(M m, V a, V b) { return (V)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)m); }
  static V keep(M m, V a) { return (V)(m & (M)a); }
  static uint32_t bits(M m) { return _mm256_movemask_ps((__m256)m); }
  static M mask(uint32_t bits) {
    const M lane = {1, 2, 4, 8, 16, 32, 64, 128};
    return (lane & (int32_t)bits) == lane;
  }
#else
  using M = vint;
  static V fma(V a, V b, V c) { return a * b + c; }
  static V max(V a, V b) { return a > b ? a : b; }
  static V min(V a, V b) { return a < b ? a : b; }
  static M above(V a, V b) { return ~(a <= b); }
  static M below(V a, V b) { return ~(a >= b); }
  static V select(M m, V a, V b) { return m ? a : b; }
  static V keep(M m, V a) { return (V)(m & (M)a); }
  static uint32_t bits(M m) {
    uint32_t b = 0;
    for (int i = 0; i < W; ++i) b |= (uint32_t)(m[i] & 1) << i;
    return b;
  }
  static M mask(uint32_t bits) {
    const M lane = {1, 2, 4, 8, 16, 32, 64, 128};
    return (lane & (int32_t)bits) != 0;
  }
#endif
};

struct OfDouble {
  using C = double;
  using V = vdouble;
  using M = vlong;
  static constexpr int W = double_lanes;
  static V set(double x) { return x - V{}; }
  static V load_c(const double* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
  static void store_c(double* p, V v) { std::memcpy(p, &v, sizeof v); }
  static double sum(V v) { return lane_sum<V, double>(v, W); }
#if defined(__AVX512F__)
  static V fma(V a, V b, V c) { return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#else
  static V fma(V a, V b, V c) { return a * b + c; }
#endif
  static V max(V a, V b) { return a > b ? a : b; }
  static V min(V a, V b) { return a < b ? a : b; }
  static M above(V a, V b) { return ~(a <= b); }
  static M below(V a, V b) { return ~(a >= b); }
  static V select(M m, V a, V b) { return m ? a : b; }
  static V keep(M m, V a) { return (V)(m & (M)a); }
  static uint32_t bits(M m) {
    uint32_t b = 0;
    for (int i = 0; i < W; ++i) b |= (uint32_t)(m[i] & 1) << i;
    return b;
  }
  static M mask(uint32_t bits) {
    const M lane = {1, 2, 4, 8, 16, 32, 64, 128};
    return (lane & (int64_t)bits) != 0;
  }
};

// Simd<T>: memory of type T, arithmetic in C.
template <class T>
struct Simd;

// Tails go through a full vector on the stack, which waits for its parts to arrive there: on short
// rows that costs more than the row, so AVX2 and AVX-512 have their own.
template <class S, class T>
inline typename S::V load_some(const T* p, int n, typename S::C fill) {
  typename S::C lane[S::W];
  T some[S::W] = {};
  std::memcpy(some, p, n * sizeof(T));
  S::store_c(lane, S::load(some));
  for (int i = n; i < S::W; ++i) lane[i] = fill;
  return S::load_c(lane);
}
template <class S, class T>
inline void store_some(T* p, typename S::V v, int n) {
  T some[S::W];
  S::store(some, v);
  std::memcpy(p, some, n * sizeof(T));
}
#if defined(__AVX2__) && !defined(__AVX512F__)
inline __m256i first_lanes(int n) {
  static const int32_t lanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256((const __m256i*)(lanes + 8 - n));
}
// The first n of eight 32-bit lanes.
inline void store_lanes(float* p, __m256 v, int n) {
  __m128 half = _mm256_castps256_ps128(v);
  if (n & 4) { _mm_storeu_ps(p, half); half = _mm256_extractf128_ps(v, 1); p += 4; }
  if (n & 2) { _mm_storel_pi((__m64*)p, half); half = _mm_movehl_ps(half, half); p += 2; }
  if (n & 1) _mm_store_ss(p, half);
}
// The first n of eight 16-bit lanes.
inline __m128i load_shorts(const void* from, int n) {
  const char* p = (const char*)from;
  uint64_t low = 0, high = 0;
  uint16_t one = 0;
  uint32_t two = 0;
  int at = 0;
  uint64_t* into = &low;
  if (n & 4) { std::memcpy(&low, p, 8); p += 8; into = &high; }
  if (n & 2) { std::memcpy(&two, p, 4); p += 4; *into |= two; at = 32; }
  if (n & 1) { std::memcpy(&one, p, 2); *into |= (uint64_t)one << at; }
  return _mm_set_epi64x((int64_t)high, (int64_t)low);
}
inline void store_shorts(void* to, __m128i v, int n) {
  char* p = (char*)to;
  uint64_t part = (uint64_t)_mm_cvtsi128_si64(v);
  if (n & 4) { std::memcpy(p, &part, 8); p += 8; part = (uint64_t)_mm_extract_epi64(v, 1); }
  if (n & 2) { std::memcpy(p, &part, 4); p += 4; part >>= 32; }
  if (n & 1) std::memcpy(p, &part, 2);
}
#endif

template <>
struct Simd<float> : OfFloat {
  static V load(const float* p) { return load_c(p); }
  template <bool Past = false>
  static void store(float* p, V v) { put<Past>(p, v); }
#if defined(__AVX512F__)
  // The values in m, elsewhere 0: the load takes the mask along at no cost.
  static V load_where(M m, const float* p) { return (V)_mm512_maskz_loadu_ps(m, p); }
  static V load_n(const float* p, int n, float fill) {
    return (V)_mm512_mask_loadu_ps((__m512)set(fill), (__mmask16)((1u << n) - 1), p);
  }
  static void store_n(float* p, V v, int n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  }
#elif defined(__AVX2__)
  static V load_n(const float* p, int n, float fill) {
    const __m256i lanes = first_lanes(n);
    return select((M)lanes, (V)_mm256_maskload_ps(p, lanes), set(fill));
  }
  static void store_n(float* p, V v, int n) { store_lanes(p, (__m256)v, n); }
#else
  static V load_n(const float* p, int n, float fill) { return load_some<Simd>(p, n, fill); }
  static void store_n(float* p, V v, int n) { store_some<Simd>(p, v, n); }
#endif
};

template <>
struct Simd<double> : OfDouble {
  static V load(const double* p) { return load_c(p); }
  template <bool Past = false>
  static void store(double* p, V v) { put<Past>(p, v); }
  static V load_n(const double* p, int n, double fill) { return load_some<Simd>(p, n, fill); }
  static void store_n(double* p, V v, int n) { store_some<Simd>(p, v, n); }
};

template <>
struct Simd<bf16> : OfFloat {
  // One operation for a vector, where widening takes two. (Bytes are little-endian.)
  template <int Odd>
  static V load_half(const bf16* p) {
    vuint both;
    std::memcpy(&both, p, sizeof both);
    return (V)(Odd ? both & 0xffff0000u : both << 16);
  }
#if defined(__AVX512F__)
  template <int Odd>
  static V load_half_where(M m, const bf16* p) {
    const __m512i both = _mm512_loadu_si512(p), high = _mm512_set1_epi32(0xffff0000);
    return (V)(Odd ? _mm512_maskz_and_epi32(m, both, high) : _mm512_maskz_slli_epi32(m, both, 16));
  }
  static V load_where(M m, const bf16* p) {
    const __m256i h = _mm256_loadu_si256((const __m256i*)p);
    return (V)_mm512_maskz_slli_epi32(m, _mm512_maskz_cvtepu16_epi32(all_lanes, h), 16);
  }
#endif
  // GCC widens and narrows the halves of a vector and joins them, which takes several times as long
  // as the instructions there are.
#if defined(__AVX512F__)
  static V widen(vu16 h) { return (V)((vuint)_mm512_maskz_cvtepu16_epi32(all_lanes, (__m256i)h) << 16); }
#elif defined(__AVX2__)
  static V widen(vu16 h) { return (V)((vuint)_mm256_cvtepu16_epi32((__m128i)h) << 16); }
#else
  static V widen(vu16 h) { return (V)(__builtin_convertvector(h, vuint) << 16); }
#endif
#if defined(__AVX512BF16__)
  // As below, but that results under 1.2e-38, which have lost bits anyway, are 0.
  static vu16 narrow(V v) { return (vu16)_mm512_cvtneps_pbh((__m512)v); }
  template <bool Past>
  static void store_four(bf16* p, V a, V b, V c, V d) {
    // Two vectors in four operations, where one takes three.
    put<Past>(p, _mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    put<Past>(p + 2 * W, _mm512_cvtne2ps_pbh((__m512)d, (__m512)c));
  }
#else
  // The bits of v, rounded to nearest even, in the low half of each lane. A NaN is left as it is, as
  // what is stored is the result of arithmetic and so has its quiet bit.
  static vuint round(V v) {
    const vuint u = (vuint)v;
    const vuint more = ((u >> 16) & 1u) + 0x7fffu;
#if defined(__AVX512F__)
    const __mmask16 ordered = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
    return (vuint)_mm512_mask_add_epi32((__m512i)u, ordered, (__m512i)u, (__m512i)more) >> 16;
#else
    return (u + (more & (vuint)(v == v))) >> 16;
#endif
  }
#if defined(__AVX512F__)
  static vu16 narrow(V v) { return (vu16)_mm512_maskz_cvtepi32_epi16(all_lanes, (__m512i)round(v)); }
  template <bool Past>
  static void store_two(bf16* p, V a, V b) {
    const __m512i packed = _mm512_packus_epi32((__m512i)round(a), (__m512i)round(b));
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    put<Past>(p, _mm512_maskz_permutexvar_epi64(0xff, order, packed));
  }
#elif defined(__AVX2__)
  static vu16 narrow(V v) {
    const __m256i r = (__m256i)round(v);
    const __m256i packed = _mm256_packus_epi32(r, r);
    return (vu16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  template <bool Past>
  static void store_two(bf16* p, V a, V b) {
    const __m256i packed = _mm256_packus_epi32((__m256i)round(a), (__m256i)round(b));
    put<Past>(p, _mm256_permute4x64_epi64(packed, 0xd8));
  }
#else
  static vu16 narrow(V v) { return __builtin_convertvector(round(v), vu16); }
  template <bool Past>
  static void store_two(bf16* p, V a, V b) { store<Past>(p, a); store<Past>(p + W, b); }
#endif
  template <bool Past>
  static void store_four(bf16* p, V a, V b, V c, V d) {
    store_two<Past>(p, a, b);
    store_two<Past>(p + 2 * W, c, d);
  }
#endif
  static V load(const bf16* p) { vu16 h; std::memcpy(&h, p, sizeof h); return widen(h); }
  template <bool Past = false>
  static void store(bf16* p, V v) { put<Past>(p, narrow(v)); }
#if defined(__AVX512F__)
  static V load_n(const bf16* p, int n, float fill) {
    const __mmask16 m = (1u << n) - 1;
    const V v = widen((vu16)_mm256_maskz_loadu_epi16(m, p));
    return (V)_mm512_mask_mov_ps((__m512)set(fill), m, (__m512)v);
  }
  static void store_n(bf16* p, V v, int n) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)narrow(v));
  }
#elif defined(__AVX2__)
  static V load_n(const bf16* p, int n, float fill) {
    return select((M)first_lanes(n), widen((vu16)load_shorts(p, n)), set(fill));
  }
  static void store_n(bf16* p, V v, int n) { store_shorts(p, (__m128i)narrow(v), n); }
#else
  static V load_n(const bf16* p, int n, float fill) { return load_some<Simd>(p, n, fill); }
  static void store_n(bf16* p, V v, int n) { store_some<Simd>(p, v, n); }
#endif
};

template <>
struct Simd<f16> : OfFloat {
#if defined(__AVX512F__)
  static V load(const f16* p) { return (V)_mm512_maskz_cvtph_ps(all_lanes, _mm256_loadu_si256((const __m256i*)p)); }
  template <bool Past = false>
  static void store(f16* p, V v) {
    put<Past>(p, _mm512_maskz_cvtps_ph(all_lanes, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  static V load(const f16* p) { return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  template <bool Past = false>
  static void store(f16* p, V v) {
    put<Past>(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static V load(const f16* p) {
    V v;
    for (int i = 0; i < W; ++i) { _Float16 h; std::memcpy(&h, p + i, 2); v[i] = (float)h; }
    return v;
  }
  template <bool Past = false>
  static void store(f16* p, V v) {
    vu16 bits;
    for (int i = 0; i < W; ++i) { const _Float16 h = (_Float16)v[i]; std::memcpy((char*)&bits + 2 * i, &h, 2); }
    put<Past>(p, bits);
  }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  static V load_n(const f16* p, int n, float fill) {
    return select((M)first_lanes(n), (V)_mm256_cvtph_ps(load_shorts(p, n)), set(fill));
  }
  static void store_n(f16* p, V v, int n) {
    store_shorts(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT), n);
  }
#else
  static V load_n(const f16* p, int n, float fill) { return load_some<Simd>(p, n, fill); }
  static void store_n(f16* p, V v, int n) { store_some<Simd>(p, v, n); }
#endif
};

// Copies a finished piece past the caches.
inline void stream_out(void* to, const void* from, int64_t bytes) {
#if defined(__x86_64__)
  struct Line { char bytes[64]; };
  char* out = (char*)to;
  const char* in = (const char*)from;
  int64_t i = std::min<int64_t>(bytes, -(uintptr_t)out & 63);
  std::memcpy(out, in, i);
  for (; i + 64 <= bytes; i += 64) stream(out + i, *(const Line*)(in + i));
  std::memcpy(out + i, in + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

// Asks for what will be read next; past the end of a tensor that is for nothing, but allowed. Always
// inlined, as what calls it has to be: GCC takes a function that does nothing else for one without
// effect, and drops its calls.
[[gnu::always_inline]] inline void fetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i, 0, 2);
}

// Streamed stores are weakly ordered: a thread fences before it reports its work done.
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace batchnorm::BATCHNORM_ISA
