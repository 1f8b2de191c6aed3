"""What kernels of this room share inside: the matrix product that keeps its tensor cores, and the
one place that knows of the interpreter.
"""

import triton
import triton.language as tl

from tokenkernels.triton._launch import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """acc + a·b in float32, products of float32 exact."""
    return dot_as(a, b, acc, "ieee")


@triton.jit
def dot_as(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in float32; operands keep their dtype on a GPU, and float32 is multiplied as
    PRECISION says.

    Where numpy stands in for a GPU they are widened, after rounding to that dtype: to float64, as
    the order of its float32 sums changes with the blocks.
    """
    if INTERPRETED:
        wide = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return acc + wide.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """`value` in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        value = value.to(tl.float32)
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def store(pointer, value, mask):
    """Stores `value` in the dtype of the pointer, rounded to nearest even."""
    tl.store(pointer, narrow(value, pointer.dtype.element_ty), mask)


@triton.jit
def at_run_time(sizes):
    """Three integers of a tuple as numbers with a type, also a 1, which Triton compiles in."""
    zero = tl.program_id(0) * 0
    return sizes[0] + zero, sizes[1] + zero, sizes[2] + zero


@triton.jit
def halves(x):
    """(R, W) → its left and its right half."""
    R: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (R, 2, W // 2)), (0, 2, 1)))


@triton.jit
def total(x):
    """Σ over the columns of (R, W), by halves: the same order however the rows were loaded.

    The sum of the one column that is left keeps the compiler from halving anew for every layout
    in which the result is wanted.
    """
    for _ in tl.static_range(9):
        if x.shape[1] > 1:
            left, right = halves(x)
            x = left + right
    return tl.sum(x, 1)


@triton.jit
def total_of(x):
    """Σ of a vector, by halves."""
    return tl.sum(total(x[None, :]), 0)
