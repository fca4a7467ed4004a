# Builds ggml-cpu several times, each for other CPUs, if XQUANT_CPU_VARIANTS; cpu-variant.cpp says how one is chosen.
#
# llama.cpp's own GGML_CPU_ALL_VARIANTS builds more of them, and makes modules of all backends, which every program must
# load from a folder that it knows.
#
#   CPU_VARIANTS  the targets
set(avx2 -mavx -mavx2 -mfma -mf16c -mbmi2)
set(avx512 -mavx512f -mavx512cd -mavx512bw -mavx512dq -mavx512vl -mavx512vnni)
set(flags_amx ${avx2} ${avx512} -mavx512vbmi -mavx512bf16 -mamx-tile -mamx-int8)
set(flags_avx512 ${avx2} ${avx512})
set(flags_avxvnni ${avx2} -mavxvnni)
set(flags_avx2 ${avx2})
set(flags_neon-i8mm -march=armv8.2-a+dotprod+fp16+i8mm)
set(flags_neon-dotprod -march=armv8.2-a+dotprod+fp16)

# the last is libggml-cpu
set(names built-in)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  if(XQUANT_CPU_VARIANTS)
    set(names amx avx512 avxvnni avx2 sse42)
    if(WIN32) # which lets a process use AMX when it asks for it, and llama.cpp asks Linux alone
      list(REMOVE_ITEM names amx)
    endif()
  elseif(GGML_AVX2 AND NOT (GGML_NATIVE OR GGML_AVX_VNNI OR GGML_AVX512))
    set(names avx2)
  endif()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  if(XQUANT_CPU_VARIANTS)
    set(names neon-i8mm neon-dotprod neon)
  elseif(NOT (GGML_NATIVE OR GGML_CPU_ARM_ARCH))
    set(names neon)
  endif()
endif()
list(POP_BACK names last)

include(CheckCXXCompilerFlag)
foreach(name ${names})
  list(JOIN flags_${name} " " flags)
  string(MAKE_C_IDENTIFIER XQUANT_COMPILES_CPU_${name} compiles)
  check_cxx_compiler_flag("${flags}" ${compiles})
  if(NOT ${compiles})
    list(REMOVE_ITEM names ${name})
  endif()
endforeach()

if(GGML_OPENMP_ENABLED) # llama.cpp's folder has found it for itself alone
  find_package(OpenMP REQUIRED)
endif()
get_target_property(folder ggml-cpu SOURCE_DIR)
get_target_property(sources ggml-cpu SOURCES)
list(TRANSFORM sources PREPEND ${folder}/ REGEX "^[^/]")
get_directory_property(definitions DIRECTORY ${folder} COMPILE_DEFINITIONS)
set(exports ${CMAKE_CURRENT_LIST_DIR}/cpu-variant.map)
set(CPU_VARIANTS "")
foreach(name ${names})
  set(variant xquant-cpu-${name})
  list(APPEND CPU_VARIANTS ${variant})
  add_library(${variant} SHARED ${sources} ${CMAKE_CURRENT_LIST_DIR}/cpu-variant-entry.cpp)
  foreach(property COMPILE_DEFINITIONS COMPILE_FEATURES COMPILE_OPTIONS INCLUDE_DIRECTORIES LINK_LIBRARIES)
    get_target_property(value ggml-cpu ${property})
    if(value)
      set_property(TARGET ${variant} PROPERTY ${property} ${value})
    endif()
  endforeach()
  target_compile_definitions(${variant} PRIVATE ${definitions})
  target_compile_options(${variant} PRIVATE ${flags_${name}})
  if(NOT (WIN32 OR APPLE)) # there a library says of each name in which other it looks for it
    # libggml-cpu has the same names, and in programs comes first
    target_link_options(${variant} PRIVATE LINKER:--version-script=${exports})
    set_property(TARGET ${variant} PROPERTY LINK_DEPENDS ${exports})
  endif()
endforeach()

target_sources(ggml PRIVATE ${CMAKE_CURRENT_LIST_DIR}/cpu-variant.cpp ${CMAKE_SOURCE_DIR}/native/cpu/cpu_features.cpp)
target_include_directories(ggml PRIVATE ${folder} ${CMAKE_CURRENT_LIST_DIR} ${CMAKE_SOURCE_DIR}/native/cpu)
list(JOIN names "," built)
set(built ${built},${last})
string(REGEX REPLACE "^," "" built ${built})
message(STATUS "llama.cpp's CPU kernels: ${built}")
target_compile_definitions(ggml PRIVATE XQUANT_CPU_VARIANTS="${built}"
  LIBRARY_PREFIX="${CMAKE_SHARED_LIBRARY_PREFIX}" LIBRARY_SUFFIX="${CMAKE_SHARED_LIBRARY_SUFFIX}")
