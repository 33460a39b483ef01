// Functions compiled several times, for the instruction sets of x86-64, and the choice among
// them at run time. Elsewhere there is the portable version alone, parts of which use NEON on
// aarch64.
#pragma once

#include <atomic>

namespace df11 {

// kAvx512Vbmi is AVX-512 with VBMI and VBMI2. Loops below have no version of their own for it: it
// has that for AVX-512.
enum class Simd { kPortable, kAvx2, kAvx512, kAvx512Vbmi };

#if defined(__x86_64__) && defined(__GNUC__)
#define DF11_X86 1
#define DF11_TARGET_AVX2 __attribute__((target("avx2,bmi,bmi2,lzcnt")))
#ifdef __clang__  // does not know how to prefer a width
#define DF11_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,bmi,bmi2,lzcnt")))
#else
#define DF11_TARGET_AVX512 \
  __attribute__((          \
      target("avx512f,avx512bw,avx512dq,avx512vl,bmi,bmi2,lzcnt,prefer-vector-width=512")))
#endif
#endif

inline Simd best_simd() {
#ifdef DF11_X86
  // Every processor with AVX2 and BMI2 has LZCNT; clang cannot ask for that.
  if (__builtin_cpu_supports("bmi2")) {
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      const bool vbmi =
          __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
      return vbmi ? Simd::kAvx512Vbmi : Simd::kAvx512;
    }
    if (__builtin_cpu_supports("avx2")) return Simd::kAvx2;
  }
#endif
  return Simd::kPortable;
}

// The level that the CPU handlers use: the best that the processor has, unless tests choose another
// that it has.
inline std::atomic<Simd> chosen_simd{best_simd()};
inline void use_simd(Simd level) { chosen_simd = level; }
inline Simd simd_in_use() { return chosen_simd; }

// Defines NAME_portable, NAME_avx2 and NAME_avx512, which inline NAME<Simd>, and selects one of
// them as a function pointer.
#ifdef DF11_X86
#define DF11_FOR_EACH_SIMD(RESULT, NAME, PARAMETERS, ARGUMENTS)                                 \
  inline RESULT NAME##_portable PARAMETERS { return NAME<Simd::kPortable> ARGUMENTS; }          \
  DF11_TARGET_AVX2 inline RESULT NAME##_avx2 PARAMETERS { return NAME<Simd::kAvx2> ARGUMENTS; } \
  DF11_TARGET_AVX512 inline RESULT NAME##_avx512 PARAMETERS {                                   \
    return NAME<Simd::kAvx512> ARGUMENTS;                                                       \
  }
#define DF11_SELECT(SIMD, NAME)                    \
  ((SIMD) >= ::df11::Simd::kAvx512 ? NAME##_avx512 \
   : (SIMD) == ::df11::Simd::kAvx2 ? NAME##_avx2   \
                                   : NAME##_portable)
#else
#define DF11_FOR_EACH_SIMD(RESULT, NAME, PARAMETERS, ARGUMENTS) \
  inline RESULT NAME##_portable PARAMETERS { return NAME<Simd::kPortable> ARGUMENTS; }
#define DF11_SELECT(SIMD, NAME) ((void)(SIMD), NAME##_portable)
#endif

}  // namespace df11
