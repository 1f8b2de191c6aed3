# What find_package(tokenkernels) reads; tokenkernels::cuda is there where it was built and the CUDA toolkit is found.
include(${CMAKE_CURRENT_LIST_DIR}/tokenkernels-target.cmake)
if(EXISTS ${CMAKE_CURRENT_LIST_DIR}/tokenkernels_cuda-target.cmake)
  find_package(CUDAToolkit QUIET)
  if(CUDAToolkit_FOUND)
    include(${CMAKE_CURRENT_LIST_DIR}/tokenkernels_cuda-target.cmake)
  endif()
endif()
