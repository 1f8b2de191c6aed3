"""compact_kv_paged beyond the registry: what it has in common with compact_kv, which blocks a
sequence owns, what is never read or written, and calls one after another.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenkernels as tk

pytestmark = pytest.mark.usefixtures("native")


def _kept(tokens: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(tokens, generator=generator)[:count].sort().values


def _table(batch: int, most: int, seed: int = 0) -> Tensor:
    """Random blocks of a pool that has one more than the sequences do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(batch * most + 1, generator=generator)[:-1].view(batch, most)


def _dense(tensor: Tensor, table: Tensor) -> Tensor:
    """(num_blocks, block_size, G, D) as (B, G, T, D)."""
    return tensor[table].flatten(1, 2).transpose(1, 2)


@pytest.mark.parametrize("order", ["stable", "fill"])
@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("rows", ["all", "sample", "head"])
def test_the_same_as_compact_kv_on_the_blocks_laid_out(order: str, size: int, rows: str) -> None:
    most, batch, heads = 48 // size, 3, 2
    table = _table(batch, most)
    pool = [tuple(torch.randn(len(table) * most + 1, size, heads, 10) for _ in range(2))]
    shape = {"all": (), "sample": (batch,), "head": (batch, heads)}[rows]
    index = torch.stack([_kept(45, 20, n) for n in range(torch.Size(shape).numel())])
    index = index.view(*shape, 20)
    layers = [tuple(_dense(tensor, table) for tensor in pool[0])]
    want = tk.compact_kv(layers, index, order=order)
    got = tk.compact_kv_paged(pool, table, index, torch.tensor(45), order=order)
    assert torch.equal(got.positions, want.positions)
    assert torch.equal(got.lengths, want.lengths)
    for tensor, expected in zip(pool[0], want.layers[0], strict=True):
        assert torch.equal(_dense(tensor, table)[:, :, :20], expected)
    kept = -(-20 // size)
    assert torch.equal(got.freed[:, : -(-45 // size) - kept], table[:, kept : -(-45 // size)])
    assert (got.freed[:, -(-45 // size) - kept :] == -1).all()


@pytest.mark.parametrize("order", ["stable", "fill"])
def test_a_sequence_does_not_depend_on_its_batch(order: str) -> None:
    table, lengths = _table(3, 8), torch.tensor([30, 9, 25])
    pool = torch.randn(2, 25, 4, 2, 6)
    index = torch.full((3, 12), -1)
    for b, count in enumerate((12, 4, 7)):
        index[b, :count] = _kept(int(lengths[b]), count, b)
    together, alone = pool.clone(), pool.clone()
    tk.compact_kv_paged([tuple(together)], table, index, lengths, order=order)
    for b in range(3):
        own = slice(b, b + 1)
        tk.compact_kv_paged([tuple(alone)], table[own], index[own], lengths[own], order=order)
    assert torch.equal(together, alone)


def test_an_empty_batch() -> None:
    pool = torch.randn(2, 5, 4, 2, 6)
    table = torch.zeros(0, 3, dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int64)
    done = tk.compact_kv_paged([tuple(pool)], table, torch.zeros(0, 2).long(), none)
    assert done.freed.shape == (0, 3) and done.lengths.shape == (0,)


def test_a_cache_whose_heads_come_first_is_compacted_where_it_lies() -> None:
    """As flash-attention engines keep it: (2, num_blocks, G, block_size, D)."""
    joint, table, index = torch.randn(2, 9, 2, 4, 8), _table(2, 4), _kept(16, 5)
    cache = [tuple(joint.transpose(2, 3).unbind(0))]
    want = [_dense(tensor, table)[:, :, index] for tensor in cache[0]]
    done = tk.compact_kv_paged(cache, table.int(), index, torch.tensor([16, 16]))
    assert done.pool[0][0].data_ptr() == joint.data_ptr()
    for tensor, expected in zip(joint, want, strict=True):
        assert torch.equal(_dense(tensor.transpose(1, 2), table)[:, :, :5], expected)


@pytest.mark.parametrize("order", ["stable", "fill"])
@pytest.mark.parametrize("shape", [(2, 16, 8, 64), (2, 16, 1, 700)])
def test_results_larger_than_the_cache(order: str, shape: tuple[int, ...]) -> None:
    """Also rows that end in the middle of a line."""
    table, index = _table(2, 600), _kept(9600, 5000)
    pool = torch.randint(0, 255, (shape[0], 1201, *shape[1:]), dtype=torch.uint8)
    want, lengths = pool.clone(), torch.tensor([9600, 9600])
    tk.compact_kv_paged([tuple(want)], table, index, lengths, order=order, backend="reference")
    tk.compact_kv_paged([tuple(pool)], table, index, lengths, order=order)
    assert torch.equal(pool, want)


def test_more_than_two_to_the_31_elements() -> None:
    """Memory that is never touched costs nothing: only a few rows are written and read."""
    blocks, size, channels = 2**21, 16, 128
    cache = torch.empty(blocks, size, 1, channels, dtype=torch.uint8)
    table = torch.tensor([[blocks - 1, 3, blocks - 2]])
    for value, position in enumerate((2, 20, 47)):
        cache[table[0, position // size], position % size] = value + 1
    kept = torch.tensor([2, 20, 47])
    tk.compact_kv_paged([(cache,)], table, kept, torch.tensor([48]))
    assert cache[-1, :3, 0, 0].tolist() == [1, 2, 3]


def test_one_compaction_after_another() -> None:
    """Lengths per head of the first are what the second may keep of; fewer blocks each time."""
    pool, table = torch.randn(2, 9, 4, 2, 6), _table(2, 4)
    want = _dense(pool[0], table)
    first = torch.tensor([[[1, 4, 9, 12, 15], [0, 2, -1, -1, -1]]] * 2)
    once = tk.compact_kv_paged([tuple(pool)], table, first, torch.tensor([16, 16]))
    assert once.lengths.tolist() == [[5, 2]] * 2 and (once.freed >= 0).sum(-1).tolist() == [2, 2]
    second = torch.tensor([[[0, 4], [1, -1]]] * 2)
    twice = tk.compact_kv_paged(once.pool, table, second, once.lengths)
    assert torch.equal(twice.freed, torch.stack([table[:, 1], *[torch.full((2,), -1)] * 3], 1))
    got = _dense(pool[0], table)
    assert torch.equal(got[:, 0, :2], want[:, 0, [1, 15]])
    assert torch.equal(got[:, 1, 0], want[:, 1, 2])


def _refused(pool: Tensor, table: Tensor, words: str, **call: Any) -> None:
    before = pool.clone()
    for backend in ("native", "reference"):
        with pytest.raises(ValueError, match=f"compact_kv_paged: {words}"):
            tk.compact_kv_paged([tuple(pool)], table, **call, backend=backend)
        assert torch.equal(pool, before)


def test_a_refused_call_changes_nothing() -> None:
    """The fault is in the last sequence, the last head, the last entry."""
    pool, table, lengths = torch.randn(2, 9, 4, 2, 6), _table(2, 4), torch.tensor([16, 16])
    index = _kept(15, 6).expand(2, 2, -1).clone()
    for fault in (16, 2**33, -2, int(index[-1, -1, -2])):
        bad = index.clone()
        bad[-1, -1, -1] = fault
        _refused(pool, table, "index", index=bad, lengths=lengths)
    _refused(pool, table, "lengths", index=index, lengths=torch.tensor([16, 17]))
    for fault in (-1, 9, 2**31, -(2**31), int(table[0, 0]), int(table[1, 0])):
        bad = table.clone()
        bad[-1, 1] = fault
        _refused(pool, bad, "block_table", index=index, lengths=lengths)


@pytest.mark.parametrize("order", ["stable", "fill"])
def test_shared_blocks_may_be_read_and_not_written(order: str) -> None:
    table = _table(2, 4)
    table[1, :2] = table[0, :2]
    pool, lengths = torch.randn(2, 9, 4, 2, 6), torch.tensor([16, 16])
    before = pool.clone()
    for count in (8, 7):
        index = torch.cat((torch.arange(count), torch.tensor([9, 11, 14])))
        call = {"index": index, "lengths": lengths, "order": order}
        if count == 7:
            _refused(pool, table, "block_table: .* those written once", **call)
            continue
        same = {"rope": (torch.ones(3), index, index)}
        tk.compact_kv_paged([tuple(pool)], table, **call, **same)
        assert torch.equal(pool[:, table[0, :2]], before[:, table[0, :2]])
        index, pool = index.clone(), before.clone()
        turned = {"rope": (torch.ones(3), index, index + (torch.arange(11) == 7))}
        _refused(pool, table, "block_table", **call, **turned)


def test_blocks_behind_those_in_use_are_never_read() -> None:
    pool, table, index = torch.randn(2, 9, 4, 2, 6), _table(2, 4), _kept(7, 3)
    want, lengths = pool.clone(), torch.tensor([8, 7])
    expected = tk.compact_kv_paged([tuple(want)], table, index, lengths)
    for junk in (-1, 2**40, int(table[0, 0])):
        got, other = pool.clone(), table.clone()
        other[:, 2:] = junk
        done = tk.compact_kv_paged([tuple(got)], other, index, lengths)
        assert torch.equal(got, want) and torch.equal(done.freed, expected.freed)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int16, torch.bool, torch.float64])
def test_any_dtype_moves_as_bytes(dtype: torch.dtype) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2, (9, 4, 2, 3 * size), dtype=torch.uint8)
    table, index, want = _table(2, 4), _kept(16, 5), raw.clone()
    lengths = torch.tensor([16, 16])
    tk.compact_kv_paged([(want,)], table, index, lengths)
    tk.compact_kv_paged([(raw.view(dtype),)], table, index, lengths)
    assert torch.equal(raw, want)


def test_freed_takes_the_longest_of_layers_and_heads() -> None:
    pool = [(torch.randn(9, 4, 2, 6),), (torch.randn(9, 4, 2, 6),)]
    table = _table(2, 4)
    index = [
        _kept(16, 3),
        torch.tensor([[[0, 1, 2, 3, 4], [5, -1, -1, -1, -1]], [[2] + [-1] * 4] * 2]),
    ]
    done = tk.compact_kv_paged(pool, table, index, torch.tensor([16, 13]))
    assert [one.tolist() for one in done.lengths] == [3, [[5, 1], [1, 1]]]
    assert torch.equal(done.freed[0], torch.tensor([*table[0, 2:].tolist(), -1, -1]))
    assert torch.equal(done.freed[1], torch.tensor([*table[1, 1:].tolist(), -1]))


def test_a_leaf_that_requires_grad_is_refused() -> None:
    pool = torch.randn(9, 4, 2, 6, requires_grad=True)
    with pytest.raises(ValueError, match="compact_kv_paged: pool: allowed no leaf"):
        tk.compact_kv_paged([(pool,)], _table(2, 4), _kept(16, 5), torch.tensor([16, 16]))
