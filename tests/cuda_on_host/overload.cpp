// What the test object adds to the bindings: what they borrow is always poisoned; tests choose the
// schedule and whether it is a Hopper; the bench asks what is launched on a large GPU.
#include "cuda_on_host/executor.h"

namespace tk::bind {
bool poisoned = true;
}

extern "C" __attribute__((visibility("default"))) void tokenkernels_schedule(int order,
                                                                             int window) {
  tk::cuda::host::set_schedule(order, window);
}

extern "C" __attribute__((visibility("default"))) void tokenkernels_claim_group_products(int yes) {
  tk::cuda::host::claim_group_products(yes != 0);
}

extern "C" __attribute__((visibility("default"))) void tokenkernels_play(int64_t multiprocessors) {
  tk::cuda::host::play(multiprocessors);
}

extern "C" __attribute__((visibility("default"))) const char* tokenkernels_launches_noted() {
  return tk::cuda::host::launches_noted();
}
