# ardlora_add_isa_sources(<target>): adds cpu/isa/<name>.cpp with its flags, to that file only, where the compiler has
# them. The rest of the code stays at the platform's baseline and runs on every CPU.
include(CheckCXXCompilerFlag)

function(_ardlora_add_isa target name)
  set(source ${PROJECT_SOURCE_DIR}/csrc/cpu/isa/${name}.cpp)
  string(TOUPPER ${name} upper)
  string(REPLACE ";" " " flags "${ARGN}")
  if(flags)
    set(CMAKE_REQUIRED_FLAGS ${flags})
    check_cxx_compiler_flag("" ARDLORA_COMPILES_${upper})
    if(NOT ARDLORA_COMPILES_${upper})
      return()
    endif()
  endif()
  target_sources(${target} PRIVATE ${source})
  # No contraction: a multiply-add is fused where the kernel says so, in every tile alike.
  if(NOT MSVC)
    list(APPEND ARGN -ffp-contract=off -O3)
  endif()
  # GCC 12's own AVX-512 header trips these warnings (GCC bug 105593).
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND ARGN -Wno-maybe-uninitialized -Wno-uninitialized)
  endif()
  set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${ARGN}")
  target_compile_definitions(${target} PRIVATE ARDLORA_HAVE_${upper})
endfunction()

function(ardlora_add_isa_sources target)
  _ardlora_add_isa(${target} scalar)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    if(MSVC)
      _ardlora_add_isa(${target} avx2 /arch:AVX2)
      _ardlora_add_isa(${target} avx512 /arch:AVX512)
    else()
      _ardlora_add_isa(${target} avx2 -mavx2 -mfma -mf16c)
      _ardlora_add_isa(
        ${target}
        avx512
        -mavx512f
        -mavx512bw
        -mavx512dq
        -mavx512vl
        -mfma)
      _ardlora_add_isa(
        ${target}
        avx512_bf16
        -mavx512f
        -mavx512bw
        -mavx512dq
        -mavx512vl
        -mfma
        -mavx512bf16)
    endif()
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
    _ardlora_add_isa(${target} neon)
  endif()
endfunction()
