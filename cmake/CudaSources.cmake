# ardlora_add_cuda_sources(<target>): the CUDA kernels as a fat binary where nvcc works, otherwise the stub. cudart is
# linked statically (CMAKE_CUDA_RUNTIME_LIBRARY=Shared for the other way), so the module loads without a driver.
set(ARDLORA_CUDA
    AUTO
    CACHE STRING "Build CUDA kernels: ON, OFF, or AUTO (where nvcc works)")
set_property(CACHE ARDLORA_CUDA PROPERTY STRINGS AUTO ON OFF)

# enable_language wants file scope, therefore a macro.
macro(ardlora_add_cuda_sources target)
  set(ardlora_cuda_mode ${ARDLORA_CUDA})
  if(ardlora_cuda_mode STREQUAL "AUTO")
    include(CheckLanguage)
    check_language(CUDA)
    set(ardlora_cuda_mode ${CMAKE_CUDA_COMPILER})
  endif()
  if(ardlora_cuda_mode)
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90-real 100 120-real) # newer ones by the PTX of 100
    endif()
    enable_language(CUDA)
    target_sources(${target} PRIVATE csrc/cuda/controller.cu csrc/cuda/launch.cu csrc/cuda/lora_linear.cu)
    # C++17: CMake 3.25 knows no later dialect of nvcc.
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo>)
    set_target_properties(
      ${target}
      PROPERTIES CUDA_STANDARD 17
                 CUDA_STANDARD_REQUIRED ON
                 CUDA_VISIBILITY_PRESET hidden
                 CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
  else()
    target_sources(${target} PRIVATE csrc/cuda/unavailable.cpp)
  endif()
endmacro()
