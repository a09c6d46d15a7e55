# SPDX-License-Identifier: Apache-2.0
"""Estimators: where the gradient of z_q goes, since argmin has none.

An estimator names a *carrier* g (N, d). The value of z_q is exactly the selected code, e.detach() + (g - g.detach());
its backward is that of g.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from steadyvq.quantizers.base import Assignment


def straight_through(assignment: Assignment) -> Tensor:
    """The gradient of z_q is handed to z unchanged (Bengio et al. 2013; van den Oord et al. 2017)."""
    return assignment.z


def direct(assignment: Assignment) -> Tensor:
    """The gradient of z_q goes to the selected code: exact, for use when the encoder is frozen and needs none."""
    return assignment.selected


ESTIMATORS: dict[str, Callable[[Assignment], Tensor]] = {"straight_through": straight_through, "direct": direct}
