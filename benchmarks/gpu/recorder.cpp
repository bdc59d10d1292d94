// Stands in for the CUDA runtime: keeps what the compiled module would launch, and launches nothing.
//
// Linked to the objects that nvcc made, in place of cudart. Host code hands every kernel's name over when the module is
// loaded, and its address, grid, block and dynamic shared memory at each launch.
#include <cstddef>
#include <cstdio>
#include <map>
#include <string>

#include <cuda_runtime_api.h>

namespace {

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> of_address;  // filled before main, so made when first asked for
  return of_address;
}

std::string& launches() {
  static std::string lines;
  return lines;
}

bool records = true;

}  // namespace

extern "C" {

// Whether launches are kept from now on, or only left out: what that takes is the host's part of a launch.
__attribute__((visibility("default"))) void record_launches(bool wanted) { records = wanted; }

// The launches since the last call, a line each: name, grid, block, bytes of dynamic shared memory.
__attribute__((visibility("default"))) const char* recorded_launches() {
  static std::string handed_over;
  handed_over.swap(launches());
  launches().clear();
  return handed_over.c_str();
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* address, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[address] = name;
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* address, void**) {
  if (!records) return cudaSuccess;
  char numbers[128];
  dim3 grid = config->gridDim, block = config->blockDim;
  std::snprintf(numbers, sizeof numbers, " %u %u %u %u %u %u %zu\n", grid.x, grid.y, grid.z, block.x, block.y, block.z,
                config->dynamicSmemBytes);
  launches() += names().at(address) + numbers;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the recorder launches nothing"; }

}  // extern "C"
