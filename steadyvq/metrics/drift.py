# SPDX-License-Identifier: Apache-2.0
"""How far an encoder moves under a codebook, measured on a fixed probe batch."""

import math

from torch import Tensor


def relative_quantisation_error(latents: Tensor, z_q: Tensor) -> float:
    """Return sum_i |z_q_i - z_i|^2 / sum_i |z_i - mean z|^2 over all latents.

    Unlike the commitment loss it does not change when the latents are scaled: 0 is lossless, 1 is no better than
    replacing every latent by the mean. It is infinite for latents that are all equal and not met exactly.

    Args:
        latents: Encoder outputs z, (..., d), features last.
        z_q: Their codes, the same shape.
    """
    z = _rows(latents)
    error = float((_rows(z_q) - z).square().sum())
    return _ratio(error, float((z - z.mean(0)).square().sum()))


def encoder_drift(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return how far the same inputs' latents moved: relative to their spread, and as a plain RMS distance.

    drift = sqrt(mean_i |after_i - before_i|^2) / sqrt(mean_i |before_i - mean before|^2), so 0 is no movement and 1 a
    movement as large as the spread of the latents.

    Args:
        before: Latents of the probe batch earlier, (..., d), features last.
        after: Latents of the same batch now, the same shape.

    Returns:
        The drift, and its numerator in the latents' own units.
    """
    old = _rows(before)
    moved = math.sqrt(float((_rows(after) - old).square().sum(1).mean()))
    return _ratio(moved, math.sqrt(float((old - old.mean(0)).square().sum(1).mean()))), moved


def assignment_churn(before: Tensor, after: Tensor) -> float:
    """Return the fraction of positions whose index changed; positions masked (-1) in both are left out."""
    counted = (before >= 0) | (after >= 0)
    return float((before != after).sum()) / max(1, int(counted.sum()))


class Probe:
    """Remembers the latents and indices of a fixed probe batch and compares each call with the last one."""

    def __init__(self) -> None:
        self._latents: Tensor | None = None
        self._indices: Tensor | None = None

    def __call__(self, latents: Tensor, z_q: Tensor, indices: Tensor) -> dict[str, float | None]:
        """Measure the probe batch.

        Args:
            latents: Encoder outputs of the probe batch, (..., d); the same inputs in the same order each time.
            z_q: Their codes.
            indices: Their indices; of several layers all are compared.

        Returns:
            ``relative_error`` of this call, and against the call before ``drift``, ``drift_rms`` and ``churn``, which
            are None at the first call.

        Raises:
            ValueError: The shape differs from that of the call before.
        """
        measured: dict[str, float | None] = {"drift": None, "drift_rms": None, "churn": None}
        if self._latents is not None and self._indices is not None:
            if self._latents.shape != latents.shape:
                raise ValueError(
                    f"the probe latents have shape {tuple(latents.shape)}, but had {tuple(self._latents.shape)} "
                    "before: pass the same probe batch every time"
                )
            measured["drift"], measured["drift_rms"] = encoder_drift(self._latents, latents)
            measured["churn"] = assignment_churn(self._indices, indices)
        measured["relative_error"] = relative_quantisation_error(latents, z_q)
        # Copies on the CPU: the caller may update the latents in place, and a probe must not hold device memory.
        self._latents = latents.detach().cpu().clone()
        self._indices = indices.detach().cpu().clone()
        return measured

    def state_dict(self) -> dict[str, Tensor]:
        """Return what was remembered; empty before the first call."""
        if self._latents is None or self._indices is None:
            return {}
        return {"latents": self._latents, "indices": self._indices}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned."""
        self._latents = state.get("latents")
        self._indices = state.get("indices")


def _rows(latents: Tensor) -> Tensor:
    return latents.detach().reshape(-1, latents.shape[-1]).cpu().double()


def _ratio(part: float, whole: float) -> float:
    if whole == 0.0:
        return 0.0 if part == 0.0 else math.inf
    return part / whole
