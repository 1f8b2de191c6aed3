// `program planted NAME ORDER WINDOW` launches one wrong kernel, `program sound` every right one in
// all schedules, `program list` says which planted ones there are.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda_on_host/executor.h"
#include "cuda_on_host/planted.h"

namespace {

using namespace tk::cuda::host;

int planted(const char* name, int order, int window) {
  set_schedule(order, window);
  std::vector<uint32_t> memory(kCount);
  for (int i = 0; i < kPlantedCount; ++i) {
    if (std::strcmp(kPlanted[i].name, name) != 0) continue;
    const char* error = kPlanted[i].launch(memory.data());
    std::puts(error != nullptr ? error : "not caught");
    return 0;
  }
  return 1;
}

int sound() {
  int bad = 0;
  for (int i = 0; i < kSoundCount; ++i) {
    for (int order = 0; order < 3; ++order) {
      for (int window = 0; window < 3; ++window) {
        set_schedule(order, window);
        const char* difference = kSound[i].run();
        if (difference == nullptr) continue;
        std::printf("%s, order %d, window %d: %s\n", kSound[i].name, order, window, difference);
        bad = 1;
      }
    }
  }
  return bad;
}

}  // namespace

int main(int count, char** words) {
  if (count == 5 && std::strcmp(words[1], "planted") == 0)
    return planted(words[2], std::atoi(words[3]), std::atoi(words[4]));
  if (count == 2 && std::strcmp(words[1], "sound") == 0) return sound();
  if (count == 2 && std::strcmp(words[1], "list") == 0) {
    for (int i = 0; i < kPlantedCount; ++i) std::puts(kPlanted[i].name);
    return 0;
  }
  return 1;
}
