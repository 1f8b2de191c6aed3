// What the program of planted faults and sound kernels calls by name.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace tk::cuda::tried {

constexpr int kCount = 512;  // words of the memory that a planted kernel gets

struct Planted {
  const char* name;
  const char* (*launch)(uint32_t* memory);
};
extern const Planted kPlanted[], kPlantedCopies[], kPlantedGroups[];
extern const int kPlantedCount, kPlantedCopiesCount, kPlantedGroupsCount;

// Memory as the GPU hands it out.
template <class T>
struct Aligned {
  explicit Aligned(size_t count)
      : data(static_cast<T*>(std::aligned_alloc(128, (count * sizeof(T) + 127) / 128 * 128))) {}
  ~Aligned() { std::free(data); }
  Aligned(const Aligned&) = delete;
  T* data;
};

// A kernel without fault, launched and compared with what it must give: null, or what differs.
struct Sound {
  const char* name;
  const char* (*run)();
};
extern const Sound kSound[], kSoundCopies[], kSoundGroups[], kSoundProducts[];
extern const int kSoundCount, kSoundCopiesCount, kSoundGroupsCount, kSoundProductsCount;

}  // namespace tk::cuda::tried
