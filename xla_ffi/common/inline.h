// How functions are made to be inlined, on the host and on a device.
#pragma once

// Inlined even where the compiler would not: into functions for other instruction sets.
#define DF11_INLINE inline __attribute__((always_inline))
// The same, for host and device.
#ifdef __CUDACC__
#define DF11_HD __host__ __device__ __forceinline__
#else
#define DF11_HD DF11_INLINE
#endif
