# SPDX-License-Identifier: Apache-2.0
"""Dense float64 definitions of the kernels: slow, readable, and the oracle of every test.

Every function materialises an N x K array, so these are for small inputs. Shapes: N latents, K codes, d dimensions.
"""

import torch
from torch import Tensor


def squared_distance(z: Tensor, e: Tensor) -> Tensor:
    """Squared Euclidean distance over the last dimension in float64, with one fixed order of summation.

    Equation: sum_k (double(z_k) - double(e_k))^2, added up by folding the upper half of the terms onto the lower half
    until one is left. `Tensor.sum` picks its order from the shape of the whole tensor on some devices, so its last bit
    depends on how many rows are reduced together; folding gives the same bits for a pair wherever it is computed,
    which is what makes ties fall the same way at every batch size, block size and device.

    Args:
        z: (..., d) any floating dtype.
        e: (..., d) any floating dtype, broadcast against `z`.

    Returns:
        (...) float64.
    """
    return _folded((z.double() - e.double()).square_())


def negative_product(z: Tensor, e: Tensor) -> Tensor:
    """Minus the inner product over the last dimension in float64, added up in the order of `squared_distance`."""
    return -_folded(z.double() * e.double())


def _folded(terms: Tensor) -> Tensor:
    left = terms.shape[-1]
    while left > 1:
        half = (left + 1) // 2
        terms[..., : left - half] += terms[..., half:left]
        left = half
    return terms[..., 0]


def nearest(z: Tensor, table: Tensor, *, dot: bool = False) -> tuple[Tensor, Tensor]:
    """Argmin over codes of `squared_distance` (with `dot` of `negative_product`), the lowest index on equality.

    A latent with a non-finite entry gets index 0 and score nan. A code with a non-finite entry is at distance inf.

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        dot: compare inner products.

    Returns:
        indices: (N,) int64.
        score: (N,) float64 squared distance to the chosen code.
    """
    distance = (negative_product if dot else squared_distance)(z.unsqueeze(1), table.unsqueeze(0))
    distance = distance.masked_fill(~table.isfinite().all(1), torch.inf)
    valid = z.isfinite().all(1)
    distance = distance.masked_fill(~valid.unsqueeze(1), torch.inf)
    score = distance.amin(1)
    codes = torch.arange(table.shape[0], device=z.device)
    indices = torch.where(distance == score.unsqueeze(1), codes, table.shape[0]).amin(1)
    return indices, score.masked_fill(~valid, torch.nan)


def distances(z: Tensor, table: Tensor, squared: bool) -> Tensor:
    """(N, K) squared distances, or distances, differentiable, in the dtype of the inputs.

    The square root is cut out of the graph where the distance is 0, so its gradient there is 0 and not nan.
    """
    square = (z.unsqueeze(1) - table.unsqueeze(0)).square().sum(-1)
    if squared:
        return square
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def weights(distance: Tensor, indices: Tensor, temperature: Tensor | float, losers: bool) -> Tensor:
    """(N, K) softmax of -distance / temperature over all codes; with `losers` the winner is zeroed *after* it."""
    weight = (-distance / temperature).softmax(1)
    if not losers:
        return weight
    return weight.scatter(1, indices.unsqueeze(1), 0.0)


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
) -> tuple[Tensor, ...]:
    """Every reduction of the weight matrix that the losses need, from its definition, in float64.

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        indices: (N,) int64 winner of every latent.
        temperature: tau > 0.
        row_weight: (N,) r; rows of weight 0 are absent, whatever their latents hold.
        column_weight: (K,) factors a_j on the row sums only.
        losers: zero the winner's weight after the softmax.
        squared: D is the squared distance, else the distance.
        want_row_sum: fill `row_mass` and `row_sum`, which are empty otherwise.

    Returns:
        (lse, winner_mass, loser_mass, row_cost, column_mass, gradient_mass, column_sum, column_cost, row_mass, row_sum)
        as described at `steadyvq.kernels.SoftStatistics`, all float64. row_mass: (N,) sum_j v_ij a_j, and
        row_sum: (N, d) sum_j v_ij a_j e_j, with the gradient weights v.
    """
    z, table = z.detach().double(), table.detach().double()
    row = torch.ones(z.shape[0], dtype=z.dtype, device=z.device) if row_weight is None else row_weight.double()
    present = row != 0
    z = torch.where(present.unsqueeze(1), z, 0.0)
    distance = distances(z, table, squared)
    everything = weights(distance, indices, temperature, losers=False)
    weight = weights(distance, indices, temperature, losers)
    gradient = weight if squared else torch.where(distance > 0, weight / (2 * distance), 0.0)
    pull = gradient if column_weight is None else gradient * column_weight.double()
    rows = {
        "lse": torch.logsumexp(-distance / temperature, 1),
        "winner_mass": everything.gather(1, indices.unsqueeze(1)).squeeze(1),
        "loser_mass": everything.scatter(1, indices.unsqueeze(1), 0.0).sum(1),
        "row_cost": (weight * distance).sum(1),
    }
    return (
        *(torch.where(present, value, 0.0) for value in rows.values()),
        row @ weight,
        row @ gradient,
        gradient.T @ (row.unsqueeze(1) * z),
        row @ (weight * distance),
        torch.where(present, pull.sum(1), 0.0) if want_row_sum else row[:0],
        torch.where(present.unsqueeze(1), pull @ table, 0.0) if want_row_sum else z[:0],
    )


def non_stationary_loss(
    z: Tensor,
    table: Tensor,
    indices: Tensor,
    *,
    temperature: Tensor | float,
    row_weight: Tensor | None = None,
    denominator: Tensor | float | None = None,
    per_code: bool = False,
    prior: float = 1e-2,
    squared: bool = True,
) -> Tensor:
    """The non-stationary loss by plain autograd, in the dtype of the inputs.

    Equation: 1 / (M d) sum_i r_i sum_{j != q_i} sg[w_ij] D_ij a_j, with w = softmax_j(-D_ij / tau), M the valid count,
    a_j = 1, or sg[1 / (prior + sum_i r_i w_ij)] with `per_code`.

    Source: NSVQ, arXiv 2606.11363, the non-stationary loss.
    """
    row = z.new_ones(z.shape[0]) if row_weight is None else row_weight.to(z.dtype)
    z = torch.where((row != 0).unsqueeze(1), z, 0.0)
    distance = distances(z, table, squared)
    weight = row.unsqueeze(1) * weights(distance, indices, temperature, losers=True).detach()
    if per_code:
        weight = weight / (weight.sum(0) + prior)
    count = row.sum() if denominator is None else denominator
    return (weight * distance).sum() / (count * z.shape[1])
