// The tensor cores of a group: products are asked for by its four warps together, read what their
// descriptors say, and are done when somebody waits for them, not before.
#include <algorithm>
#include <cstring>

#include "cuda/launch.cuh"

namespace tk::cuda::host {
namespace {

constexpr uint32_t kReserved = 1024;  // bytes of shared memory that a Hopper keeps for itself
bool claimed = false;

// A descriptor's fields.
struct Place {
  uint32_t start, leading, stride;
  explicit Place(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4) {}
};

// The place in the arena of term k of row `row` of an operand, along its rows k following k or,
// transposed, row following row: in bytes, whose bits 4–6 are then changed by bits 7–9.
int64_t place_of_term(uint64_t bits, bool transposed, int size, int row, int k) {
  const Place place(bits);
  const int panel = 128 / size;
  const uint32_t byte = transposed ? row % panel * size + row / panel * place.leading +
                                         k % 8 * 128 + k / 8 * place.stride
                                   : k * size + row % 8 * 128 + row / 8 * place.stride;
  const uint32_t address = place.start + byte;
  return int64_t{address ^ (address >> 7 & 7) << 4} - kReserved;
}

int size_of(Number number) { return number == Number::kTf32 ? 4 : 2; }
int depth_of(const Factors& factors) { return 32 / size_of(factors.number); }

void check_descriptor(uint64_t bits, bool transposed, const char* which) {
  const uint64_t unused = 0x3ull << 14 | 0x3ull << 30 | 0x7ull << 46 | 0x3ffull << 52;
  const std::string operand = std::string("the ") + which + " operand of a product";
  if (bits >> 62 != 1 || (bits >> 49 & 7) != 0 || (bits & unused) != 0)
    fault("wrong descriptor: " + operand + " does not lie in pieces that change places within " +
          "128 bytes");
  const uint32_t start = Place(bits).start;
  if (start % (transposed ? 1024 : 32) != 0 || (start & 0x380) != 0)
    fault("misaligned image: " + operand + " begins " + std::to_string(start % 1024) +
          " bytes behind a multiple of 1024");
}

// Pieces of 16 bytes that a product reads.
struct Pieces {
  const Factors& factors;
  int each = 16 / size_of(factors.number);
  int depth = depth_of(factors);
  int left = factors.in_registers ? 0 : 64 * depth / each;
  int count = left + factors.columns * depth / each;

  int64_t operator[](int at) const {
    const bool of_left = at < left;
    const int index = of_left ? at : at - left;
    const bool turned = of_left ? factors.across : factors.transposed;
    const int rows = of_left ? 64 : factors.columns;
    const int row = turned ? index % (rows / each) * each : index % rows;
    const int k = turned ? index / (rows / each) : index / rows * each;
    return place_of_term(of_left ? factors.left : factors.right, turned, size_of(factors.number),
                         row, k);
  }
};

bool overlap(const void* a, size_t a_bytes, uintptr_t b, size_t b_bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(a);
  return begin < b + b_bytes && b < begin + a_bytes;
}

size_t bytes_of_sums(const Product& product) {
  return static_cast<size_t>(product.factors.columns) * 2;
}

// Whether it has registers of the thread there.
bool holds(const Product& product, int thread, uintptr_t address, size_t bytes) {
  const int at = thread % kGroup;
  return overlap(product.sums[at], bytes_of_sums(product), address, bytes) ||
         (product.factors.in_registers && overlap(product.left[at], 16, address, bytes));
}

void check_registers(const void* from, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(from);
  for (const Registers& fenced : now.fiber->fenced_registers) {
    if (fenced.begin <= begin && begin + bytes <= fenced.end) return;
  }
  fault("multiply_add_group on registers that were touched since the last fence_products of them");
}

float to_number(const char* from, Number number) {
  uint16_t half;
  uint32_t word;
  std::memcpy(&half, from, 2);
  if (number == Number::kBf16) return to_float(BFloat16{half});
  if (number == Number::kFp16) return to_float(Half{half});
  std::memcpy(&word, from, 4);
  return float_of(word & ~0x1fffu);  // what is below 10 bits of a tf32 the cores do not see
}

// An operand as rows of its terms.
std::vector<float> gather(const Factors& factors, bool of_left) {
  const int depth = depth_of(factors), rows = of_left ? 64 : factors.columns;
  std::vector<float> to(static_cast<size_t>(rows * depth));
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < depth; ++k) {
      const int64_t at = place_of_term(of_left ? factors.left : factors.right,
                                       of_left ? factors.across : factors.transposed,
                                       size_of(factors.number), row, k);
      to[static_cast<size_t>(row * depth + k)] = to_number(now.block->arena + at, factors.number);
    }
  }
  return to;
}

// The left operand from registers: each holds a word of row lane / 4 (+ 8), of the first or the
// second half of the terms.
std::vector<float> gather_registers(const Product& product) {
  const int size = size_of(product.factors.number), per = 4 / size, depth = 32 / size;
  std::vector<float> to(static_cast<size_t>(64 * depth));
  for (int thread = 0; thread < kGroup; ++thread) {
    for (int i = 0; i < 4 * per; ++i) {
      const int reg = i / per, lane = thread % 32;
      const int row = thread / 32 * 16 + lane / 4 + reg % 2 * 8;
      const int k = lane % 4 * per + reg / 2 * 4 * per + i % per;
      to[static_cast<size_t>(row * depth + k)] =
          to_number(reinterpret_cast<const char*>(product.left[thread] + reg) + i % per * size,
                    product.factors.number);
    }
  }
  return to;
}

// Sums are laid out, warp by warp, as those of m16n8.
void compute(Product& product) {
  const Factors& factors = product.factors;
  const auto columns = static_cast<size_t>(factors.columns);
  const auto depth = static_cast<size_t>(depth_of(factors));
  const std::vector<float> left =
      factors.in_registers ? gather_registers(product) : gather(factors, true);
  const std::vector<float> right = gather(factors, false);
  for (size_t row = 0; row < 64; ++row) {
    for (size_t column = 0; column < columns; ++column) {
      const size_t thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
      float& sum = product.sums[thread][column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
      if (!factors.add) sum = 0;
      for (size_t k = 0; k < depth; ++k) sum += left[row * depth + k] * right[column * depth + k];
    }
  }
  product.done = true;
}

// All of the group have come: until they wait, nobody may write what is read.
void begin(Block& block, int first, const std::shared_ptr<Product>& product) {
  const Pieces pieces{product->factors};
  for (int i = 0; i < pieces.count; ++i)
    block.read_by_groups[pieces[i] / 16 * 8 + first / kGroup] = product;
}

}  // namespace

GroupProducts group_products_here() {
  return claimed ? GroupProducts::kWherever : GroupProducts::kNowhere;
}
void claim_group_products(bool yes) { claimed = yes; }

uint32_t shared_address(const void* place) {
  return static_cast<uint32_t>(static_cast<const char*>(place) - now.block->arena) + kReserved;
}

void fence_registers(const void* from, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(from);
  now.multiplies_in_groups = true;
  now.fiber->fenced_registers.push_back({begin, begin + bytes});
}

void multiply_add_group(const Factors& factors, float* sums, const uint32_t* left, Site site) {
  Block& block = *now.block;
  const int thread = current_thread(), first = thread / kGroup * kGroup;
  if (first + kGroup > block.threads)
    fault("multiply_add_group by a group that is not whole: the block has " +
          std::to_string(block.threads) + " threads");
  if (!factors.in_registers) check_descriptor(factors.left, factors.across, "left");
  check_descriptor(factors.right, factors.transposed, "right");
  check_registers(sums, static_cast<size_t>(factors.columns) * 2);
  if (factors.in_registers) check_registers(left, 16);
  const Pieces pieces{factors};
  for (int i = thread % 32; i < pieces.count; i += 32) {
    look(pieces[i], 16);
    check_fenced("multiply_add_group", pieces[i], 16);
  }
  for (const UnderWay& other : now.fiber->products) {
    const Factors& its = other.product->factors;
    if (holds(*other.product, thread, reinterpret_cast<uintptr_t>(sums),
              static_cast<size_t>(factors.columns) * 2) &&
        (its.columns != factors.columns || its.number != factors.number))
      fault("multiply_add_group on sums of a product of another shape that is under way");
  }
  GroupState& group = block.groups[static_cast<size_t>(first / kGroup)];
  if (group.come == 0) {
    group.product = std::make_shared<Product>(Product{factors, site, false, {}, {}, {}});
  } else if (!(group.product->factors == factors && group.product->site == site)) {
    fault("multiply_add_group of warps apart: others of the group ask for another product, at " +
          place_of(group.product->site));
  }
  group.product->sums[thread - first] = sums;
  group.product->left[thread - first] = left;
  now.fiber->products.push_back({group.product, 0});
  if (++group.come < kGroup) return park(State::kGroup, site);
  group.come = 0;
  begin(block, first, group.product);
  group.product.reset();
  for (int t = first; t < first + kGroup; ++t) {
    if (t != thread) wake(block, t);
  }
}

void commit_products() {
  Fiber& fiber = *now.fiber;
  ++fiber.product_groups;
  for (UnderWay& asked : fiber.products) {
    if (asked.group == 0) asked.group = fiber.product_groups;
  }
}

// Waits until at most `left` of the last groups of products are under way.
void wait_products(int left) {
  Fiber& fiber = *now.fiber;
  const int thread = current_thread(), last = fiber.product_groups - left;
  const auto over = [=](const UnderWay& asked) { return asked.group != 0 && asked.group <= last; };
  for (const UnderWay& asked : fiber.products) {
    if (!over(asked)) continue;
    Product& product = *asked.product;
    if (!product.done) compute(product);
    product.waited[thread % kGroup] = access_now(TK_CALLER);
    std::erase_if(fiber.fenced_registers, [&](const Registers& fenced) {
      return holds(product, thread, fenced.begin, fenced.end - fenced.begin);
    });
  }
  std::erase_if(fiber.products, over);
}

void touch_registers(uintptr_t address, size_t bytes, Use use) {
  Fiber& fiber = *now.fiber;
  for (const UnderWay& asked : fiber.products) {
    if (holds(*asked.product, current_thread(), address, bytes))
      fault(std::string(use == Use::kRead ? "read" : "write") +
            " of registers of a product that is under way and nobody has waited for, asked for " +
            "at " + place_of(asked.product->site));
  }
  std::erase_if(fiber.fenced_registers, [=](const Registers& fenced) {
    return address < fenced.end && fenced.begin < address + bytes;
  });
}

// A write of what a group reads, which all its warps have to be done with.
void check_not_read_by_groups(Block& block, int64_t at, size_t bytes) {
  for (int64_t piece = at / 16; piece * 16 < at + static_cast<int64_t>(bytes); ++piece) {
    for (int group = 0; group * kGroup < block.threads; ++group) {
      const auto found = block.read_by_groups.find(piece * 8 + group);
      if (found == block.read_by_groups.end()) continue;
      const Product& product = *found->second;
      for (int warp = 0; warp < kGroup / kWarp; ++warp) {
        const auto* lanes = product.waited + warp * kWarp;
        const bool known = std::any_of(lanes, lanes + kWarp, [](const Cell::Access& waited) {
          return waited.kind == Cell::kPlain && is_over(waited);
        });
        if (!known)
          fault("race on shared memory: write of byte " + std::to_string(at) +
                " of the arena, which a product asked for at " + place_of(product.site) +
                " reads: warp " + std::to_string(group * 4 + warp) +
                " has not waited for it, or no barrier is in between");
      }
    }
  }
}

}  // namespace tk::cuda::host
