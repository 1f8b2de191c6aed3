// Warps: the lanes of a mask meet, the last one to come settles what each of them gets.
#include <algorithm>
#include <bit>
#include <functional>

#include "cuda/launch.cuh"

namespace tk::cuda::host {
namespace {

// Whether the lanes of the mask have all come for the same thing.
bool alike(Exchanges lanes, const Exchange& mine) {
  for (uint32_t left = mine.asked.mask; left != 0; left &= left - 1) {
    const Exchange& other = lanes[std::countr_zero(left)];
    if (other.meeting != mine.meeting || other.asked.mask != mine.asked.mask ||
        !(other.site == mine.site))
      return false;
  }
  return true;
}

}  // namespace

Words exchange(const Meeting& meeting, Asked asked, Site site, Words give) {
  Block& block = *now.block;
  const int lane = now.thread % 32, first = now.thread - lane;
  const Exchanges lanes{now.fiber - lane};
  const uint32_t mask = asked.mask;
  if (!(mask >> lane & 1))
    fault(std::string(meeting.what) + " by a lane that is not in its mask: lane " +
          std::to_string(lane));
  Exchange& mine = now.fiber->exchange;
  mine.meeting = &meeting;
  mine.asked = asked;
  mine.site = site;
  mine.value = give;
  uint32_t& come = block.exchanging[static_cast<size_t>(first / 32)];
  come |= uint32_t{1} << lane;
  if ((come & mask) != mask || !alike(lanes, mine)) {
    park(State::kWarp, site);
    return mine.result;
  }
  meeting.settle(lanes, mask);
  come &= ~mask;
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const int other = std::countr_zero(left);
    lanes[other].meeting = nullptr;
    if (other != lane) wake(block, first + other);
  }
  return mine.result;
}

// Lane `lane_wanted` gives what this lane gets.
void settle_shuffle(Exchanges lanes, uint32_t mask) {
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const int number = std::countr_zero(left);
    Exchange& lane = lanes[number];
    const int wanted = lane.asked.lane_wanted;
    if (!(mask >> wanted & 1)) {
      blame(now.thread - now.thread % 32 + number);
      fault(std::string(lane.meeting->what) + " from an inactive lane: lane " +
            std::to_string(number) + " reads lane " + std::to_string(wanted) +
            ", which is not in the mask");
    }
    lane.result = lanes[wanted].value;
  }
}

void settle_ballot(Exchanges lanes, uint32_t mask) {
  uint32_t votes = 0;
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const int l = std::countr_zero(left);
    if (lanes[l].value.at[0] != 0) votes |= 1u << l;
  }
  for (uint32_t left = mask; left != 0; left &= left - 1)
    lanes[std::countr_zero(left)].result.at[0] = votes;
}

void settle_match(Exchanges lanes, uint32_t mask) {
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    Exchange& lane = lanes[std::countr_zero(left)];
    uint32_t same = 0;
    for (uint32_t other = mask; other != 0; other &= other - 1) {
      const int o = std::countr_zero(other);
      if (lanes[o].value.at[0] == lane.value.at[0]) same |= 1u << o;
    }
    lane.result.at[0] = same;
  }
}

namespace {

struct Least {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Most {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};

template <class T, class Combine>
void settle_reduce(Exchanges lanes, uint32_t mask) {
  const auto value_of = [&](uint32_t left) {
    return static_cast<T>(lanes[std::countr_zero(left)].value.at[0]);
  };
  T total = value_of(mask);
  for (uint32_t left = mask & (mask - 1); left != 0; left &= left - 1)
    total = Combine()(total, value_of(left));
  for (uint32_t left = mask; left != 0; left &= left - 1)
    lanes[std::countr_zero(left)].result = giving(total);
}

}  // namespace

constexpr Meeting kReduceAdd = {"reduce", settle_reduce<uint32_t, std::plus<>>};
constexpr Meeting kReduceAnd = {"reduce", settle_reduce<uint32_t, std::bit_and<>>};
constexpr Meeting kReduceOr = {"reduce", settle_reduce<uint32_t, std::bit_or<>>};
constexpr Meeting kReduceMin[2] = {{"reduce", settle_reduce<uint32_t, Least>},
                                   {"reduce", settle_reduce<int32_t, Least>}};
constexpr Meeting kReduceMax[2] = {{"reduce", settle_reduce<uint32_t, Most>},
                                   {"reduce", settle_reduce<int32_t, Most>}};

void settle_nothing(Exchanges, uint32_t) {}

void settle_sync(Exchanges, uint32_t mask) {
  know_each_other(*now.block, current_thread() / 32, mask);
}

}  // namespace tk::cuda::host
