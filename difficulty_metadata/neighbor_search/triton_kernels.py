# mypy: ignore-errors
# Triton kernels take pointers and compile-time constants.
"""The two Triton kernels of `triton_filter`.

Per pair of a query and a point `note_groups` costs 2 x 32 operations of half precision on the tensor cores, a
subtraction and a maximum; the rest of a tile's work is spread over its 64 x 128 pairs. Compiled for sm_90
(read off the SASS) the loop has 3.7 to 4.4 instructions a pair, 2 of them these two, and no spill; products are wgmma.
Every query's lists have one writer, which counts in registers: there is neither an atomic nor a prefix sum. A point's
64 bytes are read once for the 64 queries of a tile.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tiles"])
def note_groups(
    queries, limits, points, half_norms, num_tiles, notes, counts,
    width: tl.constexpr, tile_rows: tl.constexpr, tile_points: tl.constexpr, num_groups: tl.constexpr,
    capacity: tl.constexpr,
):  # fmt: skip
    """Note, for each query of a tile, the groups of all points in which one scores at least the query's limit.

    Group g of every tile goes to the query's g-th list, of length `capacity`; `counts` (Q, num_groups) are the numbers
    found. The columns of a tile belong to the groups in turn; in memory its points lie group by group.
    """
    query_tile = tl.program_id(0)
    rows = query_tile * tile_rows + tl.arange(0, tile_rows)
    dims = tl.arange(0, width)
    groups = tl.arange(0, num_groups)
    columns = tl.arange(0, tile_points)
    members = columns % num_groups * (tile_points // num_groups) + columns // num_groups
    x = tl.load(queries + rows[:, None] * width + dims[None, :])
    limit = tl.load(limits + rows)
    lists = notes + (rows[:, None].to(tl.int64) * num_groups + groups[None, :]) * capacity
    num = tl.zeros((tile_rows, num_groups), tl.int32)
    for tile in range(num_tiles):
        first = tl.cast(tile, tl.int64) * tile_points
        y = tl.load(points + first * width + members[:, None] * width + dims[None, :])
        half_norm = tl.load(half_norms + first + columns)
        scores = tl.dot(x, tl.trans(y)) - half_norm[None, :]
        best = tl.max(tl.reshape(scores, (tile_rows, tile_points // num_groups, num_groups)), axis=1)
        is_hit = best >= limit[:, None]
        tl.store(lists + num, tile * num_groups + groups[None, :], mask=is_hit & (num < capacity))
        num += is_hit.to(tl.int32)
    tl.store(counts + rows[:, None] * num_groups + groups[None, :], num)


@triton.jit
def measure_groups(
    queries, query_codes, thresholds, points, codes, notes, counts, near, squared, num_near,
    width: tl.constexpr, num_groups: tl.constexpr, group_size: tl.constexpr, capacity: tl.constexpr, room: tl.constexpr,
    at_once: tl.constexpr,
):  # fmt: skip
    """Keep, for a query, the points of its noted groups within its threshold of other buildings, at most `room`."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, width)
    members = tl.arange(0, at_once * group_size)
    x = tl.load(queries + row * width + dims)
    threshold = tl.load(thresholds + row)
    own_code = tl.load(query_codes + row)
    num = 0
    for group in range(num_groups):
        num_noted = tl.minimum(tl.load(counts + row * num_groups + group), capacity)
        for start in range(0, num_noted, at_once):
            places = start + members // group_size
            is_noted = places < num_noted
            noted = tl.load(notes + (row * num_groups + group) * capacity + places, mask=is_noted, other=0)
            candidates = noted * group_size + members % group_size
            y = tl.load(points + candidates[:, None].to(tl.int64) * width + dims[None, :])
            differences = y - x[None, :]
            distances = tl.sum(differences * differences, axis=1)
            code = tl.load(codes + candidates)
            is_near = is_noted & (distances <= threshold) & (code != own_code)
            targets = num + tl.cumsum(is_near.to(tl.int32), axis=0) - 1
            is_kept = is_near & (targets < room)
            tl.store(near + row * room + targets, candidates, mask=is_kept)
            tl.store(squared + row * room + targets, distances, mask=is_kept)
            num += tl.sum(is_near.to(tl.int32), axis=0)
    tl.store(num_near + row, num)
