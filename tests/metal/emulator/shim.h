// Metal's language as far as our kernels and MLX's use it, for clang on a host.
//
// Read in two ways. With MSL_CHECK nothing is run: address spaces are real, so what Metal would refuse is refused.
// Without, they are nothing, a thread is a fiber of machine.cpp, and what threads exchange goes through it.
// No library header is included: names such as ::exp(double) must stay invisible to a kernel.
#pragma once
typedef __INT8_TYPE__ int8_t;
typedef __INT16_TYPE__ int16_t;
typedef __INT32_TYPE__ int32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef half float16_t;
typedef __bf16 bfloat;
typedef bfloat bfloat16_t;
#define VECTORS(T)                                       \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
VECTORS(float) VECTORS(half) VECTORS(bfloat) VECTORS(uint) VECTORS(int) VECTORS(ushort) VECTORS(uchar)
VECTORS(short) VECTORS(char)
#undef VECTORS

namespace emulator {
struct Size {
  uint x, y, z;
};
// Where a thread stands. Laid out as machine.cpp fills it in.
struct Place {
  Size in_grid, in_group, group, threads, grid, groups;
  uint index, lane, simdgroup, simdgroups;
};
inline uint3 vector(Size s) { return uint3{s.x, s.y, s.z}; }
}  // namespace emulator
// Give a value to the 32 lanes of the simdgroup and get theirs. `site` tells calls apart.
extern "C" void emulator_exchange(uint64_t value, uint64_t* all, const void* site);
// fence: of threadgroup memory. whole: for the threadgroup, not the simdgroup alone.
extern "C" uint emulator_lane();
extern "C" void emulator_barrier(bool whole, bool fence, const void* site);

template <class To, class From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

namespace metal {
template <class T>
inline uint64_t encoded(T v) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &v, sizeof v);
  return bits;
}
template <class T>
inline T decoded(uint64_t bits) {
  T v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
// One call in the text is one site: cloned by the optimiser, a correct kernel would look divergent.
#define ONE_SITE __attribute__((noinline, noduplicate))
#define SITE __builtin_return_address(0)
// The order in which hardware adds is not told: this is a tree's, and comparisons have a tolerance.
#define REDUCTION(name, expression)                       \
  template <class T>                                      \
  ONE_SITE T name(T v) {                                  \
    uint64_t all[32];                                     \
    emulator_exchange(encoded(v), all, SITE);             \
    T t[32];                                              \
    for (int i = 0; i < 32; i++) t[i] = decoded<T>(all[i]); \
    for (int half = 16; half; half >>= 1)                 \
      for (int i = 0; i < half; i++) {                    \
        T x = t[i], y = t[i + half];                      \
        t[i] = (T)(expression);                           \
      }                                                   \
    return t[0];                                          \
  }
REDUCTION(simd_sum, x + y)
REDUCTION(simd_max, x > y ? x : y)
REDUCTION(simd_min, x < y ? x : y)
#undef REDUCTION
template <class T>
ONE_SITE T quad_sum(T v) {
  uint64_t all[32];
  emulator_exchange(encoded(v), all, SITE);
  uint first = emulator_lane() & ~3u;
  T sum = 0;
  for (uint i = 0; i < 4; i++) sum = (T)(sum + decoded<T>(all[first + i]));
  return sum;
}
#define SHUFFLE(name, parameter, from)            \
  template <class T>                              \
  ONE_SITE T name(T v, ushort parameter) {        \
    uint64_t all[33];                             \
    all[32] = 0;                                  \
    emulator_exchange(encoded(v), all, SITE);     \
    uint lane = emulator_lane();                  \
    (void)lane;                                   \
    return decoded<T>(all[(from) & 31]);          \
  }
SHUFFLE(simd_shuffle, source, source)
SHUFFLE(simd_broadcast, source, source)
SHUFFLE(simd_shuffle_xor, mask, lane ^ mask)
SHUFFLE(simd_shuffle_down, by, lane + by < 32 ? lane + by : lane)
#undef SHUFFLE
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
static inline ONE_SITE void threadgroup_barrier(mem_flags flags) {
  emulator_barrier(true, flags == mem_flags::mem_threadgroup, SITE);
}
static inline ONE_SITE void simdgroup_barrier(mem_flags flags) {
  emulator_barrier(false, flags == mem_flags::mem_threadgroup, SITE);
}
#undef SITE

// Metal has no double: a kernel that would compute in it does not compile.
#define FLOAT_FUNCTION(name)                                                             \
  static inline float name(float x) { return __builtin_##name##f(x); }                   \
  static inline half name(half x) { return (half)__builtin_##name##f((float)x); }        \
  double name(double) = delete;
FLOAT_FUNCTION(exp) FLOAT_FUNCTION(exp2) FLOAT_FUNCTION(log) FLOAT_FUNCTION(log2) FLOAT_FUNCTION(sqrt)
FLOAT_FUNCTION(tanh) FLOAT_FUNCTION(floor) FLOAT_FUNCTION(ceil) FLOAT_FUNCTION(round) FLOAT_FUNCTION(fabs)
#undef FLOAT_FUNCTION
static inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
static inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
namespace precise {
using metal::exp;
using metal::exp2;
using metal::log;
using metal::rsqrt;
using metal::sqrt;
}  // namespace precise
namespace fast {
using metal::exp;
using metal::exp2;
using metal::log;
using metal::sqrt;
}  // namespace fast
template <class T>
static inline T abs(T x) { return x < 0 ? -x : x; }
// Of one type, as in Metal, where two types are ambiguous.
template <class T>
static inline T max(T a, T b) { return a > b ? a : b; }
template <class T>
static inline T min(T a, T b) { return a < b ? a : b; }
template <class T>
static inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T>
static inline T select(T a, T b, bool c) { return c ? b : a; }
static inline bool signbit(float x) { return __builtin_signbit(x); }
static inline bool isnan(float x) { return x != x; }
static inline bool isfinite(float x) { return __builtin_isfinite(x); }
template <class T>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static constexpr float infinity() { return __builtin_inff(); }
  static constexpr float max() { return 3.402823466e38f; }
  static constexpr float lowest() { return -3.402823466e38f; }
};
}  // namespace metal
using namespace metal;
#define INFINITY __builtin_inff()
#define METAL_FUNC inline
// MLX puts its own utilities before every kernel; of those only this is used here, by MLX's own.
template <class T>
struct Limits {
  static constexpr T finite_min = (T)-3.402823466e38f;
};

// THREADGROUP_VARIABLE and CONSTANT_VARIABLE begin declarations; text.py puts them there.
#ifdef MSL_CHECK
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define THREADGROUP_VARIABLE static __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup
#define THREADGROUP_VARIABLE static __attribute__((section("threadgroup_memory")))
#endif
#define CONSTANT_VARIABLE static
#define thread
