// What the program of planted faults and sound kernels calls by name.
#pragma once

#include <cstdint>

namespace tk::cuda::tried {

constexpr int kCount = 512;  // words of the memory that a planted kernel gets

struct Planted {
  const char* name;
  const char* (*launch)(uint32_t* memory);
};
extern const Planted kPlanted[], kPlantedCopies[], kPlantedGroups[];
extern const int kPlantedCount, kPlantedCopiesCount, kPlantedGroupsCount;

// A kernel without fault, launched and compared with what it must give: null, or what differs.
struct Sound {
  const char* name;
  const char* (*run)();
};
extern const Sound kSound[], kSoundCopies[], kSoundGroups[], kSoundProducts[];
extern const int kSoundCount, kSoundCopiesCount, kSoundGroupsCount, kSoundProductsCount;

}  // namespace tk::cuda::tried
