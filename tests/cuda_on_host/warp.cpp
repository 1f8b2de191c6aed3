// Warps: the lanes of a mask meet, the last one to come settles what each of them gets.
#include <bit>

#include "cuda/launch.cuh"

namespace tk::cuda::host {
namespace {

// Whether all lanes of the mask have come, and for the same thing.
bool complete(const Fiber* lanes, uint32_t come, const Exchange& mine) {
  if ((come & mine.mask) != mine.mask) return false;
  for (uint32_t left = mine.mask; left != 0; left &= left - 1) {
    const Exchange& other = lanes[std::countr_zero(left)].exchange;
    if (other.what != mine.what || other.mask != mine.mask || !(other.site == mine.site))
      return false;
  }
  return true;
}

}  // namespace

Exchange& exchange(const char* what, Settle settle, uint32_t mask, Site site,
                   const Exchange& give) {
  Block& block = *now.block;
  const int thread = current_thread(), lane = thread % 32, first = thread - lane;
  Fiber* lanes = &block.fibers[static_cast<size_t>(first)];
  if (!(mask >> lane & 1))
    fault(std::string(what) + " by a lane that is not in its mask: lane " + std::to_string(lane));
  Exchange& mine = now.fiber->exchange;
  mine = give;
  mine.what = what;
  mine.settle = settle;
  mine.mask = mask;
  mine.site = site;
  uint32_t& come = block.exchanging[static_cast<size_t>(first / 32)];
  come |= uint32_t{1} << lane;
  if (!complete(lanes, come, mine)) {
    park(State::kWarp, site);
    return mine;
  }
  settle({lanes}, mask);
  come &= ~mask;
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const int other = std::countr_zero(left);
    lanes[other].exchange.what = nullptr;
    if (other != lane) wake(block, first + other);
  }
  return mine;
}

// Lane `lane_wanted` gives what this lane gets.
void settle_shuffle(Exchanges lanes, uint32_t mask) {
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const int number = std::countr_zero(left);
    Exchange& lane = lanes[number];
    if (!(mask >> lane.lane_wanted & 1)) {
      now.fiber += number - current_thread() % 32;
      fault(std::string(lane.what) + " from an inactive lane: lane " + std::to_string(number) +
            " reads lane " + std::to_string(lane.lane_wanted) + ", which is not in the mask");
    }
    for (int i = 0; i < 2; ++i) lane.result[i] = lanes[lane.lane_wanted].value[i];
  }
}

void settle_ballot(Exchanges lanes, uint32_t mask) {
  uint32_t votes = 0;
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const int l = std::countr_zero(left);
    if (lanes[l].value[0] != 0) votes |= 1u << l;
  }
  for (uint32_t left = mask; left != 0; left &= left - 1)
    lanes[std::countr_zero(left)].result[0] = votes;
}

void settle_match(Exchanges lanes, uint32_t mask) {
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    Exchange& lane = lanes[std::countr_zero(left)];
    uint32_t same = 0;
    for (uint32_t other = mask; other != 0; other &= other - 1) {
      const int o = std::countr_zero(other);
      if (lanes[o].value[0] == lane.value[0]) same |= 1u << o;
    }
    lane.result[0] = same;
  }
}

void settle_nothing(Exchanges, uint32_t) {}

void settle_sync(Exchanges, uint32_t mask) {
  know_each_other(*now.block, current_thread() / 32, mask);
}

}  // namespace tk::cuda::host
