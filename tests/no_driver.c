// A libcuda that loads anything, launches nothing and says that all went well: with it Triton's own
// launcher runs to its end where there is no GPU.
#include <stddef.h>
#include <stdint.h>

long launched;

int cuLaunchKernelEx(void* config, void* function, void** params, void** extra) {
  ++launched;
  return 0;
}

int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  *(uint64_t*)data = pointer;
  return 0;
}

int cuPointerGetAttributes(unsigned count, int* attributes, void** data, uint64_t pointer) {
  for (unsigned i = 0; i < count; ++i)
    if (data[i]) *(uint64_t*)data[i] = pointer;
  return 0;
}

// Of an H200: shared memory of a block, of one that asks for more, of a multiprocessor.
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 8 ? 49152 : attribute == 97 ? 232448 : attribute == 81 ? 233472 : 1;
  return 0;
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : 0;  // threads of a block
  return 0;
}

static int give(void** handle) {
  *handle = (void*)1;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) { return give(module); }
int cuModuleGetFunction(void** function, void* module, const char* name) { return give(function); }
int cuCtxGetCurrent(void** context) { return give(context); }
int cuDevicePrimaryCtxRetain(void** context, int device) { return give(context); }

static int zero(int* value) {
  *value = 0;
  return 0;
}
int cuDeviceGet(int* device, int number) { return zero(device); }
int cuCtxGetDevice(int* device) { return zero(device); }
int cuStreamIsCapturing(void* stream, int* status) { return zero(status); }
int cuCtxGetLimit(size_t* value, int limit) {
  *value = 0;
  return 0;
}
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuGetErrorString(int error, const char** text) {
  *text = "none";
  return 0;
}

int cuCtxSetCurrent(void) { return 0; }
int cuCtxSetLimit(void) { return 0; }
int cuFuncSetAttribute(void) { return 0; }
int cuFuncSetCacheConfig(void) { return 0; }
int cuModuleUnload(void) { return 0; }
int cuOccupancyMaxActiveClusters(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
