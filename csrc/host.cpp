// Host-side helpers that take and return Python objects; no tensors here.
#include <pybind11/pybind11.h>

#include <map>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace {

// Features that choose the CPU library, by their Linux names; only those whose registers the OS saves.
py::set cpu_features() {
  py::set found;
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return found;  // OSXSAVE
  const bool fma = c >> 12 & 1, f16c = c >> 29 & 1;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6, tiles = (low & 0x60000) == 0x60000;
  if (ymm && fma) found.add("fma");
  if (ymm && f16c) found.add("f16c");
  unsigned subleaves = 0;
  if (!__get_cpuid_count(7, 0, &subleaves, &b, &c, &d)) return found;
  const auto add = [&](bool present, const char* name) {
    if (present) found.add(name);
  };
  add(ymm && (b >> 5 & 1), "avx2");
  add(b >> 8 & 1, "bmi2");
  add(zmm && (b >> 16 & 1), "avx512f");
  add(zmm && (b >> 17 & 1), "avx512dq");
  add(zmm && (b >> 30 & 1), "avx512bw");
  add(zmm && (b >> 31 & 1), "avx512vl");
  add(zmm && (c >> 11 & 1), "avx512_vnni");
  add(zmm && (d >> 23 & 1), "avx512_fp16");
  add(tiles && (d >> 22 & 1), "amx_bf16");
  add(tiles && (d >> 24 & 1), "amx_tile");
  add(tiles && (d >> 25 & 1), "amx_int8");
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) add(zmm && (a >> 5 & 1), "avx512_bf16");
#endif
  return found;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side helpers of fastkd";
  m.attr("compiler") = "g++ " __VERSION__;
  m.def("cpu_features", &cpu_features, "CPU features usable in this process, by their Linux names");
}
