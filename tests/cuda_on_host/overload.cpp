// What the test object adds to the bindings: what they borrow is always poisoned, and tests choose
// the schedule and whether it is a Hopper.
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
