// Moves the kept positions of key/value caches together on a GPU, paged ones too: fills the tables
// that launches take by value.
#include "cuda/compact.cuh"

namespace tk {
namespace compact {
namespace {

// Walks that keep a multiprocessor busy where rows move one after the other.
constexpr int64_t kWalks = 4;
constexpr int64_t kMostRowBytes = 1 << 30;

// One plane of the grid plans, each other one moves a tensor.
template <bool kOrdered, bool kTurns, int kWords>
__global__ void __launch_bounds__(cuda::kThreads, 4 - kOrdered - kTurns)
    compact_kernel(const __grid_constant__ Table<kWords> table) {
  cuda::Arena arena;
  Hop* hops = arena.shared<Hop>(kStage);
  auto* partial = arena.shared<int64_t>(cuda::kThreads / cuda::kWarp);
  float* turns = kTurns ? arena.shared<float>(kStage) : nullptr;
  if (cuda::block_y() == 0) {
    plan(table, partial);
  } else {
    serve<kOrdered, kTurns>(table, cuda::block_y() - 1, hops, turns);
  }
}

// A table that grows: planes from the end, all other records from the start.
class Draft {
 public:
  Draft(const CompactKv& p, const Pages& pages) : p_(p) {
    Common& common = table.common;
    common.batch = p.batch;
    common.half = p.half;
    common.inv_freq = p.inv_freq;
    common.pages = pages;
    common.per_layer = static_cast<int32_t>(p.per_layer);
    common.key_dtype = p.key_dtype;
    common.fill = p.fill;
    common.in_place = p.in_place;
    common.slices = INT32_MAX;
  }

  // False where the table is full.
  bool add(int64_t layer) {
    const int64_t most = p_.per_layer * (kWordsOf<Plane> + kWordsOf<Kind>)+kWordsOf<Layer> +
                         kWordsOf<Index> + 3 * kWordsOf<List> + 4 * kWordsOf<Strides>;
    if (front_ + most > back()) return false;
    const CompactKv::Index& index = of_layer(p_.indices, p_.index_count, layer);
    Layer record{add_index(index), 0, 0, 0};
    if (p_.lengths != nullptr)
      record.lengths = add_list(of_layer(p_.lengths, p_.length_count, layer), lengths_);
    if (p_.inv_freq != nullptr) {
      record.old_positions = add_list(of_layer(p_.old_positions, p_.old_count, layer), old_);
      record.new_positions = add_list(of_layer(p_.new_positions, p_.new_count, layer), new_);
    }
    const uint16_t at = put(record, layer_);
    for (int64_t t = 0; t < p_.per_layer; ++t) add_plane(layer, t, index, at);
    return true;
  }

  Table<kMany> table{};
  int64_t most_units = 0;  // of a plane, if columns may be as narrow as they can
  int64_t most_walks = 0;  // heads of all samples, of a plane
  int64_t walks = 0;       // of all planes

  bool is_small() const { return front_ + kMany - back() <= kFew; }

  void shrink(Table<kFew>& to) const {
    to.common = table.common;
    std::memcpy(to.words, table.words, sizeof(int64_t) * static_cast<size_t>(front_));
    std::memcpy(to.words + kFew - (kMany - back()), table.words + back(),
                sizeof(int64_t) * static_cast<size_t>(kMany - back()));
  }

 private:
  template <class T>
  static const T& of_layer(const T* values, int64_t count, int64_t layer) {
    return values[count == 1 ? 0 : layer];
  }

  int back() const { return kMany - kWordsOf<Plane> * table.common.planes; }

  // Where the record is: at `last` or `other` already if there is one like it.
  template <class Record>
  uint16_t put(const Record& record, uint16_t& last, uint16_t other = 0) {
    int64_t words[kWordsOf<Record>] = {};
    std::memcpy(words, &record, sizeof record);
    for (const uint16_t at : {last, other}) {
      if (at != 0 && std::memcmp(words, table.words + at, sizeof words) == 0) return last = at;
    }
    std::memcpy(table.words + front_, words, sizeof words);
    last = static_cast<uint16_t>(front_);
    front_ += kWordsOf<Record>;
    return last;
  }

  List list_of(const CompactKv::Rows& rows) {
    const Strides strides{rows.batch_stride, rows.head_stride, rows.stride};
    return {rows.values, put(strides, strides_), static_cast<uint16_t>(rows.wide),
            static_cast<int32_t>(rows.heads)};
  }

  uint16_t add_list(const CompactKv::Rows& rows, uint16_t& last) {
    return put(list_of(rows), last);
  }

  uint16_t add_index(const CompactKv::Index& index) {
    Common& common = table.common;
    const int64_t rows = index.kept.batch * index.kept.heads;
    const int64_t chunks = index.kept.count > 0 ? (index.kept.count + kChunk - 1) / kChunk : 1;
    if (rows > common.index_rows) common.index_rows = rows;
    if (chunks > common.index_chunks) common.index_chunks = chunks;
    return put(Index{list_of(index.kept), index.kept.batch, index.kept.count, index.lengths,
                     index.positions},
               index_);
  }

  // Heads that lie one behind the other and keep the same rows move as one, unless that would be
  // more than a row may have.
  bool together(int64_t layer, bool turns, const CompactKv::Tensor& rows, const Kind& kind) const {
    const bool alike =
        of_layer(p_.indices, p_.index_count, layer).kept.heads == 1 &&
        (p_.lengths == nullptr || of_layer(p_.lengths, p_.length_count, layer).heads == 1);
    return !turns && alike && kind.heads > 1 && kind.from_head == rows.row_bytes &&
           kind.to_head == rows.row_bytes && kind.heads <= kMostRowBytes / (rows.row_bytes + 1);
  }

  void add_plane(int64_t layer, int64_t t, const CompactKv::Index& index, uint16_t record) {
    const CompactKv::Tensor& rows = p_.tensors[layer * p_.per_layer + t];
    const bool turns = p_.inv_freq != nullptr && t == 0, same = p_.in_place;
    Kind kind{rows.from_batch,
              rows.from_head,
              rows.from_row,
              same ? rows.from_batch : rows.to_batch,
              same ? rows.from_head : rows.to_head,
              same ? rows.from_row : rows.to_row,
              p_.layers[layer].heads,
              p_.layers[layer].tokens,
              rows.row_bytes};
    if (together(layer, turns, rows, kind)) {
      kind.row_bytes *= kind.heads;
      kind.heads = 1;
    }
    const auto addresses =
        reinterpret_cast<uintptr_t>(rows.from) | reinterpret_cast<uintptr_t>(rows.to);
    int word = cuda::word_of(static_cast<int64_t>(addresses) | kind.from_batch | kind.from_head |
                             kind.from_row | kind.to_batch | kind.to_head | kind.to_row |
                             (turns ? kind.row_bytes / 2 : kind.row_bytes));
    if (turns && word < 16) word = static_cast<int>(size_of(p_.key_dtype));
    // Mostly like the same tensor of the layer before, or the one before in this layer.
    uint16_t& last = kinds_[t % kPlaces];
    const uint16_t other = kinds_[(t + kPlaces - 1) % kPlaces];
    const Plane plane{static_cast<const char*>(rows.from),
                      static_cast<char*>(same ? const_cast<void*>(rows.from) : rows.to),
                      put(kind, last, other),
                      record,
                      static_cast<uint16_t>(word),
                      static_cast<uint16_t>(turns)};
    ++table.common.planes;
    std::memcpy(table.words + back(), &plane, sizeof plane);
    const int64_t own = p_.batch * kind.heads;
    const int64_t units = own * parts_of(table.common, kind, index.kept.count, turns);
    walks += own;
    most_walks = own > most_walks ? own : most_walks;
    most_units = units > most_units ? units : most_units;
  }

  static constexpr int64_t kPlaces = 8;
  const CompactKv& p_;
  int front_ = 1;  // 0 says that there is none
  uint16_t layer_ = 0, index_ = 0, lengths_ = 0, old_ = 0, new_ = 0, strides_ = 0,
           kinds_[kPlaces] = {};
};

template <bool kOrdered, bool kTurns>
const char* launch(const Draft& draft, const cuda::Launch& how) {
  if (!draft.is_small())
    return cuda::launch<compact_kernel<kOrdered, kTurns, kMany>>(how, draft.table);
  Table<kFew> table;
  draft.shrink(table);
  return cuda::launch<compact_kernel<kOrdered, kTurns, kFew>>(how, table);
}

const char* launch(Draft& draft, void* stream) {
  Common& common = draft.table.common;
  const bool ordered = common.in_place && !common.fill, turns = common.inv_freq != nullptr;
  const int64_t wanted = kWalks * cuda::multiprocessors() / (draft.walks > 0 ? draft.walks : 1);
  common.slices = static_cast<int32_t>(wanted < 1 ? 1 : wanted);
  int64_t units = draft.most_units;
  if (ordered && units / common.slices > draft.most_walks) units = draft.most_walks * common.slices;
  const int64_t plans = common.plans * common.index_rows * common.index_chunks +
                        (common.pages.table != nullptr ? common.batch : 0);
  const int64_t planned = cuda::blocks_for(plans, 1, cuda::multiprocessors());
  const cuda::Launch how{.blocks = planned > units ? planned : units,
                         .threads = cuda::kThreads,
                         .shared = cuda::shared_bytes<Hop>(kStage) +
                                   cuda::shared_bytes<int64_t>(cuda::kThreads / cuda::kWarp) +
                                   (turns ? cuda::shared_bytes<float>(kStage) : 0),
                         .stream = stream,
                         .blocks_y = 1 + common.planes};
  if (ordered) return turns ? launch<true, true>(draft, how) : launch<true, false>(draft, how);
  return turns ? launch<false, true>(draft, how) : launch<false, false>(draft, how);
}

}  // namespace

const char* run(const CompactKv& p, const Pages& pages, void* stream) {
  for (int64_t i = 0; i < p.layer_count * p.per_layer; ++i) {
    if (p.tensors[i].row_bytes > kMostRowBytes) return "a row of more bytes than a launch moves";
  }
  for (int64_t first = 0; first < p.layer_count;) {
    Draft draft(p, pages);
    int64_t layers = 0;
    while (layers < kMostLayers && first + layers < p.layer_count && draft.add(first + layers))
      ++layers;
    if (layers == 0) return "a layer of more tensors than a launch takes";
    Common& common = draft.table.common;
    const auto own = static_cast<int32_t>(layers);
    common.plans = p.index_count > 1 ? own : first == 0 ? 1 : 0;
    common.lengths = p.length_count > 1 ? own : static_cast<int32_t>(p.length_count);
    common.pages.first = first == 0;
    first += layers;
    common.pages.last = first == p.layer_count;
    if (const char* error = launch(draft, stream); error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace compact

const char* compact_kv_cuda(const CompactKv& p, void* stream) {
  return compact::run(p, {}, stream);
}

}  // namespace tk
