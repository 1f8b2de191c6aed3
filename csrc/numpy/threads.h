// A few threads of the NumPy module's own.
#pragma once

#include "pool.h"

namespace tk::bind {

// As many as the process has cores, sixteen at most; asleep between calls.
Pool pool();

}  // namespace tk::bind
