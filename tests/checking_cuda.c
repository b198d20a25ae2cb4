/* A libcuda that runs nothing and checks what it is told to launch: a line to $CHECKED for each launch and descriptor,
   with what is wrong in it after an exclamation mark. tests/test_launcher.py puts it under Triton's own launcher. */
#include "cuda.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static FILE *report(void) {
  static FILE *file;
  if (!file) setvbuf(file = fopen(getenv("CHECKED"), "a"), NULL, _IOLBF, 0);
  return file;
}

CUresult cuGetErrorString(CUresult error, const char **text) { *text = "refused by checking_cuda.c"; return 0; }
CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return 0; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return 0; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = 0; return 0; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return 0; }
CUresult cuModuleUnload(CUmodule module) { return 0; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)strdup(name);
  return 0;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) { *count = 1; return 0; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return 0;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) { /* of an H100 */
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 9;
  }
  return 0;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  int bad = !c->gridDimX || c->gridDimX > 2147483647u || !c->gridDimY || c->gridDimY > 65535 || !c->gridDimZ ||
            c->gridDimZ > 65535 || c->blockDimX * c->blockDimY * c->blockDimZ > 1024 || c->sharedMemBytes > 232448;
  fprintf(report(), "launch %s %u %u %u of %u%s\n", (char *)function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX,
          bad ? " ! dimensions" : "");
  return bad ? CUDA_ERROR_INVALID_VALUE : 0;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}, most[] = {1u << 30, 32, 64, 128};
  char wrong[512] = "";
  if (rank < 1 || rank > 5) strcat(wrong, " rank");
  if ((size_t)address % 16) strcat(wrong, " address");
  if (box[0] * bytes[type] % 16) strcat(wrong, " row");
  if (box[0] * bytes[type] > most[swizzle < 4 ? swizzle : 0]) strcat(wrong, " swizzle");
  fprintf(report(), "descriptor %d", type);
  for (unsigned i = 0; i < rank; i++) {
    if (!sizes[i] || sizes[i] > 1ul << 32) strcat(wrong, " size");
    if (!box[i] || box[i] > 256 || steps[i] != 1) strcat(wrong, " box");
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ul << 40)) strcat(wrong, " stride");
    if (i && i + 1 < rank && strides[i] < strides[i - 1]) strcat(wrong, " order");
    fprintf(report(), " %lu/%u+%lu", (unsigned long)sizes[i], box[i], i ? (unsigned long)strides[i - 1] : bytes[type]);
  }
  fprintf(report(), "%s%s\n", *wrong ? " !" : "", wrong);
  return *wrong ? CUDA_ERROR_INVALID_VALUE : 0;
}
