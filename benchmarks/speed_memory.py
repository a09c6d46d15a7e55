# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a search beyond its inputs, ours and others', each in a fresh process."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fresh import extra_bytes
from speed_search import cdist, expanded

from steadyvq import kernels

SIZE = (8192, 65536, 128)
QUICK = (512, 2048, 16)
FORMS = {"ours": kernels.nearest, "torch.cdist + argmin": cdist, "expanded matrix + argmin": expanded}


def prepared(form: str, n: int, k: int, d: int) -> Callable[[], object]:
    """The call of a fresh process whose memory is measured."""
    generator = torch.Generator().manual_seed(0)
    z, codes = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    FORMS[form](z[:512], codes[:2048])
    return partial(FORMS[form], z, codes)


def measure(quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row for every form."""
    rows = []
    for form in FORMS:
        size = QUICK if quick else SIZE
        rows.append({"size": list(size), "form": form, "extra_mb": extra_bytes(__file__, form, *size) / 1e6})
        say(f"memory of a search, {' x '.join(map(str, size))}: {form} {rows[-1]['extra_mb']:.0f} MB")
    return rows
