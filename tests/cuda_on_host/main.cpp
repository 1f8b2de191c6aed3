// `program planted NAME ORDER WINDOW` launches one wrong kernel, `program sound` every right one in
// all schedules, `program list` says which planted ones there are.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda_on_host/executor.h"
#include "cuda_on_host/planted.h"

namespace {

using namespace tk::cuda::tried;

std::vector<Planted> all_planted() {
  std::vector<Planted> all(kPlanted, kPlanted + kPlantedCount);
  all.insert(all.end(), kPlantedCopies, kPlantedCopies + kPlantedCopiesCount);
  all.insert(all.end(), kPlantedGroups, kPlantedGroups + kPlantedGroupsCount);
  return all;
}

std::vector<Sound> all_sound() {
  std::vector<Sound> all(kSound, kSound + kSoundCount);
  all.insert(all.end(), kSoundCopies, kSoundCopies + kSoundCopiesCount);
  all.insert(all.end(), kSoundGroups, kSoundGroups + kSoundGroupsCount);
  all.insert(all.end(), kSoundProducts, kSoundProducts + kSoundProductsCount);
  return all;
}

int planted(const char* name, int order, int window) {
  tk::cuda::host::set_schedule(order, window);
  std::vector<uint32_t> memory(kCount);
  for (const Planted& one : all_planted()) {
    if (std::strcmp(one.name, name) != 0) continue;
    const char* error = one.launch(memory.data());
    std::puts(error != nullptr ? error : "not caught");
    return 0;
  }
  return 1;
}

int sound() {
  int bad = 0;
  for (const Sound& one : all_sound()) {
    for (int schedule = 0; schedule < 9; ++schedule) {
      tk::cuda::host::set_schedule(schedule % 3, schedule / 3);
      const char* difference = one.run();
      if (difference == nullptr) continue;
      std::printf("%s, order %d, window %d: %s\n", one.name, schedule % 3, schedule / 3,
                  difference);
      bad = 1;
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
    for (const Planted& one : all_planted()) std::puts(one.name);
    return 0;
  }
  return 1;
}
