// How the operands of a group's products lie in shared memory: images of tiles, and the descriptors
// that say where an operand is.
//
// An image of a tile (rows, columns) is made of panels, one behind the other, of 128 bytes of each
// row; the 16-byte pieces of a row change places within 8 rows: piece p of row r lies where piece
// p ^ (r % 8) would. An array for it is shared<T>(image_size<T>(rows, columns), kImageAlignment),
// `rows` a multiple of 8, and image[image_at<T>(rows, row, column)] an element of it: 16 bytes of a
// row stay together, for vector stores and copy_async; an image may also lie ready in global memory
// for copy_bulk.
#pragma once

namespace tk::cuda {

constexpr int kImageAlignment = 1024;  // of its first byte: 8 rows of a panel

// Elements of a row in one panel.
template <class T>
constexpr int kPanel = 128 / sizeof(T);

template <class T>
__host__ __device__ constexpr int image_size(int rows, int columns) {
  return (columns + kPanel<T> - 1) / kPanel<T> * kPanel<T> * rows;
}

template <class T>
__host__ __device__ constexpr int image_at(int rows, int row, int column) {
  constexpr int piece = 16 / sizeof(T);
  const int panel = column / kPanel<T>, within = column % kPanel<T>;
  return (panel * rows + row) * kPanel<T> + (within ^ row % 8 * piece);
}

// The operand that begins at (row, column) of an image of `rows` rows: rows are its rows (64 of a
// left operand, N of a right one) and columns its depth, or, `transposed`, the other way round.
// Both are multiples of 8 rows; its depth begins at a multiple of 32 bytes, its rows, if
// transposed, at a panel. Bits 0–13 are the address, 16–29 and 32–45 the offsets of what repeats,
// all in 16 bytes; bits 62–63 say that pieces change places within 128 bytes.
template <class T, bool transposed = false>
__device__ uint64_t describe(const T* image, int rows, int row, int column) {
  static_assert(!transposed || sizeof(T) == 2);
  const auto bytes = static_cast<uint32_t>(((column / kPanel<T> * rows + row) * kPanel<T> +
                                            column % kPanel<T>)*static_cast<int>(sizeof(T)));
  const uint32_t start = (detail::shared_address(image) + bytes) >> 4;
  // Along a row the next 16 bytes follow; from panel to panel only if they hold rows of the
  // operand.
  const auto along = static_cast<uint32_t>(transposed ? rows * 128 >> 4 : 1);
  constexpr uint32_t eight_rows = 1024 >> 4, swizzled = 1u << 30;
  return uint64_t{start | along << 16} | uint64_t{eight_rows | swizzled} << 32;
}

}  // namespace tk::cuda
