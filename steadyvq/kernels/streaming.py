# SPDX-License-Identifier: Apache-2.0
"""The kernels in blocks: memory is a tile plus the outputs, whatever N x K is. Runs on any device with float64.

Rounding error of the search
============================
u is the unit roundoff of the working dtype, gamma_m = m u / (1 - m u). Everything is scaled by one power of two so that
the largest entry of latents and codes is near 2^40: a product of two such entries, summed over d, cannot overflow, and
the scaling itself is exact. c is any vector (the code mean, rounded), Z = z - c, E = e - c in exact arithmetic.

1. The stored Z^ = fl(z - c) is one correctly rounded subtraction, so |Z^ - Z| <= u |Z| entry by entry. A matrix product
   that rounds its operands again (TF32, bfloat16) adds a relative v: together rho = u + v + u v.
   Hence |Z~ . E~ - Z . E| <= (2 rho + rho^2) |Z| |E|, by Cauchy-Schwarz on the absolute values.
2. The working-precision value of n - 2 Z~ . E~ is a sum of d + 1 products in *some* order, with or without fused
   multiply-add, bias first or last: its error is at most gamma_{d+2} (n + 2 (1 + rho)^2 |Z| |E|) for every order.
   Products by 2 are exact. Tensor cores truncate instead of rounding: their u is taken four times as large.
3. The stored n, the rounded square of the computed length of E^, is off by at most a relative gamma_{d+1} + 6 u: the
   sum of squares in any order, 2 u from E^, 2 u from the root, u from the square.
4. The float64 score of a pair is off by at most (d + 2) 2^-53 (1 + small) D, with D <= (|Z| + |E|)^2.
5. What underflows loses at most 2^-126 (flush to zero included) per operation: at most 2^-126 (d + 2) (2 + |Z| + |E|)
   times 4, all in scaled units.

With s^ the computed and S = |E|^2 - 2 Z . E the exact shifted score, items 1-3 and 5 bound |s^ - S| by B', and item 4
bounds the error of a float64 score by B''. If j* wins in float64 then S_j* <= S_j + 2 B'' for every j, so
s^_j* <= min_j s^_j + 2 (B' + B''). All codes within that slack of the running minimum, which is never below the final
one, are re-scored in float64, so the winner is always among them. The slack also carries the rounding of
`minimum + slack` itself (2 u (|s^| + slack)) and a factor 1.01 for the arithmetic of the bound.

For inner products c = 0 and n = 0, and the float64 score is -z . e: its error, doubled as S is, is at most
2 (d + 1) 2^-53 |z| |e|, which item 4 covers because 4 |z| |e| <= (|z| + |e|)^2; item 3 falls away.

float64 inputs whose squares leave the range of float64 (entries above 1e150 or, all of them, below 1e-150) are outside
the contract.
"""

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from steadyvq.kernels.reference import negative_product, squared_distance

# Tile widths are multiples of the first of these numbers. A tile of C columns is first reduced to bundles of g: columns
# s, s + C/g, s + 2C/g, ... share one entry.
_GROUPS = (32, 16, 8, 4, 2)
# A pair of float64 vectors is re-scored in chunks of at most this many entries (a few MB).
_CHUNK = 1 << 18
# Exponent of the largest scaled entry; see the module docstring.
_EXPONENT = 40
# float32 logits this far below the row maximum are as good as zero; exp of less than -87 is denormal and slow.
_FLOOR = -60.0
_NEGLIGIBLE = 1e-26


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32, which holds every bfloat16, float16 and float32 value exactly."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


# --- nearest ---------------------------------------------------------------------------------------------------------


def nearest(
    z: Tensor, table: Tensor, *, dot: bool = False, block_rows: int | None = None, block_codes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Exact nearest code of every latent; same contract as `reference.nearest`.

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        dot: largest inner product in place of smallest distance.
        block_rows: latents per tile, chosen from the size if None.
        block_codes: codes per tile, chosen from the size if None.

    Returns:
        indices: (N,) int64.
        score: (N,) float64 squared distance.
    """
    if z.shape[0] == 0:
        return z.new_zeros(0, dtype=torch.int64), z.new_zeros(0, dtype=torch.float64)
    valid, usable = _finite_rows(z), _finite_rows(table)
    latents = torch.where(valid.unsqueeze(1), z, 0.0)
    ids, codes = torch.arange(table.shape[0], device=z.device), table
    if not bool(usable.all()):
        ids, codes = ids[usable], table[usable]
    if codes.shape[0] == 0:
        indices, score = ids.new_zeros(z.shape[0]), z.new_full((z.shape[0],), torch.inf, dtype=torch.float64)
    else:
        indices, score = _search(latents, codes, ids, block_rows, block_codes, dot)
    return indices.masked_fill(~valid, 0), score.masked_fill(~valid, torch.nan)


def _finite_rows(tensor: Tensor) -> Tensor:
    """(rows,) whether every entry is finite; usually all are, which the extremes tell in one cheap pass."""
    if bool(torch.stack(tensor.aminmax()).isfinite().all()):
        return torch.ones(tensor.shape[0], dtype=torch.bool, device=tensor.device)
    return tensor.isfinite().all(1)


def _search(
    z: Tensor, codes: Tensor, ids: Tensor, rows: int | None, columns: int | None, dot: bool
) -> tuple[Tensor, Tensor]:
    """Search; start again without duplicate codes if far too many candidates turn up, as equal codes always tie."""
    found = _tiled_search(z, codes, ids, rows, columns, dot, patience=16 * z.shape[0] + 4096)
    if found is None:
        distinct: Tensor
        distinct, inverse = torch.unique(codes, dim=0, return_inverse=True)
        first = ids.amax().repeat(distinct.shape[0]).scatter_reduce_(0, inverse, ids, "amin")
        found = _tiled_search(z, distinct, first, rows, columns, dot, patience=None)
        assert found is not None
    return found


def _tiled_search(
    z: Tensor, codes: Tensor, ids: Tensor, rows: int | None, columns: int | None, dot: bool, patience: int | None
) -> tuple[Tensor, Tensor] | None:
    """(indices, float64 score) over tiles; None as soon as more than `patience` candidates were re-scored."""
    rows, columns = _tile_shape(z, codes.shape[0], rows, columns)
    # Short bundles do not pay: a reduction over a middle axis is fast only if enough entries lie side by side.
    group = next((g for g in _GROUPS if columns % g == 0 and columns // g >= 32), 1)
    latents, table, norms, slack = _prepare(z, codes, group, dot)
    exact = negative_product if dot else squared_distance
    best = z.new_full((z.shape[0],), torch.inf, dtype=torch.float64)
    indices = ids.new_full((z.shape[0],), int(ids.max()))
    scratch = latents.new_empty(rows * columns)
    seen = 0
    for top in range(0, z.shape[0], rows):
        block = slice(top, min(top + rows, z.shape[0]))
        lowest = torch.full_like(slack[block], torch.inf)
        for left in range(0, table.shape[0], columns):
            tile = slice(left, min(left + columns, table.shape[0]))
            shape = (block.stop - block.start, tile.stop - tile.start)
            scores = scratch[: shape[0] * shape[1]].view(shape)
            torch.addmm(norms[tile], latents[block], table[tile].t(), alpha=-2.0, out=scores)
            row, column = _candidates(scores, lowest, slack[block], group)
            seen += row.shape[0]
            if patience is not None and seen > patience:
                return None
            _rescore(exact, z[block], codes, ids, row, column + left, best[block], indices[block])
    return indices, best


def _tile_shape(z: Tensor, num_codes: int, rows: int | None, columns: int | None) -> tuple[int, int]:
    """Latents and codes per tile: a few MB on a CPU, so that a tile is still in cache when it is reduced."""
    area = 1 << (20 if z.device.type == "cpu" else 24)
    padded = -(-num_codes // _GROUPS[0]) * _GROUPS[0]
    rows = rows or min(z.shape[0], 1024 if padded >= 1024 else area // padded)
    columns = columns or min(padded, max(_GROUPS[0], area // rows // _GROUPS[0] * _GROUPS[0]))
    return rows, columns


def _prepare(z: Tensor, codes: Tensor, group: int, dot: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled, centred latents (N, d), codes (K', d) and squared norms (K'), and the slack (N,) of the search.

    K' is K rounded up to a multiple of `group` by codes at distance infinity.
    """
    dtype = working_dtype(z, codes)
    exponent = _exponent(z, codes)
    table = _scaled(codes, exponent, -codes.shape[0] % group, dtype)
    latents = _scaled(z, exponent, 0, dtype)
    inside = table[: codes.shape[0]]
    if not dot:
        centre = inside.mean(0)
        inside.sub_(centre)
        latents.sub_(centre)
    norms = torch.linalg.vector_norm(table, dim=1).square_()
    slack = _slack(latents, norms)
    if dot:
        norms.zero_()
    norms[codes.shape[0] :] = torch.inf
    return latents, table, norms, slack


def _exponent(z: Tensor, codes: Tensor) -> int:
    """The power of two that brings the largest entry of both inputs to [2^39, 2^40)."""
    largest = torch.stack([bound.abs().double() for tensor in (z, codes) for bound in tensor.aminmax()]).amax()
    return _EXPONENT - int(torch.frexp(largest).exponent)


def _scaled(tensor: Tensor, exponent: int, padding: int, dtype: torch.dtype) -> Tensor:
    """A fresh tensor, times 2^exponent in steps that each fit the dtype, with `padding` rows of zeros at the end."""
    out = tensor.new_empty(tensor.shape[0] + padding, tensor.shape[1], dtype=dtype)
    out[: tensor.shape[0]].copy_(tensor)
    out[tensor.shape[0] :] = 0.0
    while exponent:
        step = max(-100, min(100, exponent))
        out.mul_(2.0**step)
        exponent -= step
    return out


def _slack(latents: Tensor, norms: Tensor) -> Tensor:
    """(N,) how far above the minimum a computed score may lie and still belong to the winner, in the working dtype."""
    d = latents.shape[1]
    operand, accumulate = _roundoff(latents)
    u = torch.finfo(latents.dtype).eps / 2
    rho = u + operand + u * operand
    gamma = (d + 2) * accumulate / (1 - (d + 2) * accumulate)
    stored = (d + 1) * u / (1 - (d + 1) * u)
    # Computed lengths are themselves rounded; (1 + rho) and (1 + stored) lead back to upper bounds of the exact ones.
    reach = torch.linalg.vector_norm(latents, dim=1).double() * ((1 + rho) * (1 + stored))
    code = norms.amax().double().sqrt() * ((1 + rho) * (1 + stored))
    product, norm = reach * code, code * code
    size = norm + 2 * product * (1 + rho) ** 2
    score = gamma * size + 2 * (2 * rho + rho * rho) * product + (stored + 6 * u) * norm
    exact = (d + 3) * 2.0**-53 * (reach + code) ** 2
    underflow = 2.0**-124 * (d + 2) * (2 + reach + code)
    slack: Tensor = 1.01 * (2 * (score + exact + underflow) + 4 * u * size)
    return slack.to(latents.dtype)


def _roundoff(latents: Tensor) -> tuple[float, float]:
    """Unit roundoff of the second rounding of a product's operands (0: none), and of its accumulation.

    Only float32 products may be computed from shorter operands. Every knob of every backend is read and the worst one
    counts; operands may be cut off instead of rounded, hence twice the unit roundoff.
    """
    u = torch.finfo(latents.dtype).eps / 2
    if latents.dtype == torch.float64:
        return 0.0, u
    modes = _matmul_modes()
    if "bf16" in modes or "medium" in modes:
        return 2.0**-7, 4 * u
    if "tf32" in modes or "high" in modes:
        return 2.0**-10, 4 * u
    return 0.0, u


def _matmul_modes() -> set[str]:
    """Every float32 matmul setting of this process, of the old interface and of the one that replaces it."""
    backends = torch.backends
    places = (backends, backends.cuda, backends.cudnn, backends.mkldnn)
    modes = set()
    for place in (*places, *(getattr(place, "matmul", None) for place in places)):
        modes.add(str(getattr(place, "fp32_precision", "none")))
    # It raises once the new interface was used for one backend only; that setting was read above.
    with contextlib.suppress(RuntimeError):
        modes.add(torch.get_float32_matmul_precision())
    return modes


def _candidates(scores: Tensor, lowest: Tensor, slack: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(row, column) of every entry of a tile within the slack of its row's running minimum, which is updated in place.

    The tile is reduced once, to minima of `group` columns each; only groups that qualify are looked into.
    """
    shape = (scores.shape[0], group, scores.shape[1] // group)
    grouped = scores.view(shape)
    minima = grouped.amin(1)
    torch.minimum(lowest, minima.amin(1), out=lowest)
    limit = lowest + slack
    row, bundle = (minima <= limit.unsqueeze(1)).nonzero(as_tuple=True)
    pick, member = (grouped[row, :, bundle] <= limit[row].unsqueeze(1)).nonzero(as_tuple=True)
    return row[pick], member * shape[2] + bundle[pick]


def _rescore(
    exact: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    codes: Tensor,
    ids: Tensor,
    row: Tensor,
    column: Tensor,
    best: Tensor,
    indices: Tensor,
) -> None:
    """Fold candidate pairs into the running (score, lowest index) of every row, in place, in chunks."""
    size = max(1, _CHUNK // z.shape[1])
    for r, c in zip(torch.split(row, size), torch.split(column, size), strict=True):
        score = exact(z[r], codes[c])
        improved = best.scatter_reduce(0, r, score, "amin")
        indices.masked_fill_(improved < best, torch.iinfo(torch.int64).max)
        best.copy_(improved)
        # Pairs that do not reach the best score send an index that can never be the lowest.
        code = torch.where(score == improved[r], ids[c], torch.iinfo(torch.int64).max)
        indices.scatter_reduce_(0, r, code, "amin")


# --- soft statistics -------------------------------------------------------------------------------------------------


def soft_statistics(
    z: Tensor,
    table: Tensor,
    indices: Tensor,
    temperature: Tensor | float,
    row_weight: Tensor | None = None,
    column_weight: Tensor | None = None,
    *,
    losers: bool = True,
    squared: bool = True,
    want_row_sum: bool = False,
    block_rows: int | None = None,
) -> tuple[Tensor, ...]:
    """Same contract as `reference.soft_statistics`, in one pass over blocks of rows, in the working dtype.

    Distances are expanded (|z|^2 + |e|^2 - 2 z.e), so both inputs should be centred first. Weights below 1e-26 of the
    largest of their row are zero.

    Args:
        z: (N, d) latents, float32 or float64.
        table: (K, d) codes, same dtype.
        indices: (N,) int64.
        temperature: tau > 0.
        row_weight: (N,) or None.
        column_weight: (K,) or None.
        losers: zero the winner's weight.
        squared: D is the squared distance, else the distance.
        want_row_sum: fill the last two outputs.
        block_rows: latents per block, chosen from K if None.
    """
    row = torch.ones_like(z[:, 0]) if row_weight is None else row_weight.to(z.dtype)
    present = row != 0
    z = torch.where(present.unsqueeze(1), z, 0.0)
    sums = _Sums(z, table, want_row_sum)
    factor = torch.ones_like(sums.norms) if column_weight is None else column_weight.to(z.dtype)
    scaled = table * factor.unsqueeze(1) if want_row_sum else table
    rows = max(1, min(block_rows or _soft_rows(table), z.shape[0]))
    first, second = (z.new_empty(rows, table.shape[0]) for _ in range(2))
    for top in range(0, z.shape[0], rows):
        block = slice(top, min(top + rows, z.shape[0]))
        distance, weight = first[: block.stop - top], second[: block.stop - top]
        _distances(z[block], table, sums.norms, squared, out=distance)
        total = sums.add_softmax(block, distance, indices[block], temperature, losers, out=weight)
        share = row[block] / total
        sums.column_mass.addmv_(weight.t(), share)
        if squared:
            distance.mul_(weight)
        else:
            _pull(distance, weight)
            sums.gradient_mass.addmv_(weight.t(), share)
        sums.add_costs(block, distance, total, share)
        sums.column_sum.addmm_(weight.t(), z[block] * share.unsqueeze(1))
        if want_row_sum:
            sums.row_mass[block] = (weight @ factor) / total
            sums.row_sum[block] = (weight @ scaled) / total.unsqueeze(1)
    return sums.outputs(present, squared)


class _Sums:
    """The accumulated outputs of `soft_statistics`; weights arrive without their row's normaliser."""

    def __init__(self, z: Tensor, table: Tensor, want_row_sum: bool) -> None:
        self.norms = torch.linalg.vector_norm(table, dim=1).square_()
        self.lse, self.winner_mass, self.loser_mass, self.row_cost = (torch.zeros_like(z[:, 0]) for _ in range(4))
        self.column_mass, self.gradient_mass, self.column_cost = (torch.zeros_like(self.norms) for _ in range(3))
        self.column_sum = torch.zeros_like(table)
        kept = z.shape[0] if want_row_sum else 0
        self.row_mass, self.row_sum = z.new_zeros(kept), z.new_zeros(kept, z.shape[1])

    def add_softmax(
        self, block: slice, distance: Tensor, winner: Tensor, temperature: Tensor | float, losers: bool, *, out: Tensor
    ) -> Tensor:
        """Write exp((min D - D) / tau) to `out`, with or without the winner; return the normaliser of every row."""
        lowest = distance.amin(1, keepdim=True)
        torch.sub(lowest, distance, out=out).div_(temperature).clamp_(min=_FLOOR).exp_()
        F.threshold(out, _NEGLIGIBLE, 0.0, inplace=True)
        winner = winner.unsqueeze(1)
        top = out.gather(1, winner)
        # The losers are added up by themselves: 1 - winner mass would lose them where the winner has nearly all of it.
        rest = out.scatter_(1, winner, 0.0).sum(1)
        if not losers:
            out.scatter_(1, winner, top)
        total = rest + top.squeeze(1)
        self.lse[block] = total.log() - lowest.squeeze(1) / temperature
        self.winner_mass[block] = top.squeeze(1) / total
        self.loser_mass[block] = rest / total
        return total

    def add_costs(self, block: slice, cost: Tensor, total: Tensor, share: Tensor) -> None:
        """Reduce weight times distance over both sides."""
        self.row_cost[block] = cost.sum(1) / total
        self.column_cost.addmv_(cost.t(), share)

    def outputs(self, present: Tensor, squared: bool) -> tuple[Tensor, ...]:
        """The tuple of the contract; rows that are not present are zero."""
        rows = (self.lse, self.winner_mass, self.loser_mass, self.row_cost)
        last = (self.row_mass, self.row_sum)
        if self.row_mass.shape[0]:
            last = (self.row_mass * present, self.row_sum * present.unsqueeze(1))
        return (
            *(value * present for value in rows),
            self.column_mass,
            self.column_mass.clone() if squared else self.gradient_mass,
            self.column_sum,
            self.column_cost,
            *last,
        )


def _soft_rows(table: Tensor) -> int:
    """Latents per block: two scratch buffers of 4 MB in float32 on a CPU, more where 64 rows need it."""
    area = 1 << (20 if table.device.type == "cpu" else 24)
    return max(64, min(512, area // table.shape[0]))


def _distances(z: Tensor, table: Tensor, norms: Tensor, squared: bool, *, out: Tensor) -> None:
    """Write the (R, K) distances of a block to `out`."""
    torch.addmm(norms, z, table.t(), alpha=-2.0, out=out)
    out.add_(torch.linalg.vecdot(z, z).unsqueeze(1)).clamp_(min=0.0)
    if not squared:
        out.sqrt_()


def _pull(distance: Tensor, weight: Tensor) -> None:
    """From distances and weights w to costs w D and gradient weights w / (2 D), 0 where D is 0, both in place."""
    weight.div_(distance).mul_(0.5).masked_fill_(distance == 0, 0.0)
    distance.square_().mul_(2.0).mul_(weight)
