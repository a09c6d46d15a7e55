# SPDX-License-Identifier: Apache-2.0
"""Early warnings: what the ages of codes say before it is too late, one sentence each, once."""

from collections.abc import Mapping
from typing import Any

from steadyvq.diagnosis.thresholds import DYING, HOPELESS, IDLE_HITS, STILLBORN, STILLBORN_AFTER


def early_warnings(step: int, num_codes: int, ages: Mapping[str, Any]) -> dict[str, str]:
    """What is to be said at a step, by kind.

    Args:
        step: Optimiser steps so far.
        num_codes: K.
        ages: What `CodeAges.alive` returned.
    """
    said = {}
    per_code = ages["tokens"] / num_codes
    # Codes placed on an encoder that has learned nothing die in its first steps whatever the method; revived ones come back.
    unaided = ages["died"] > DYING and ages["revived"] == 0
    if per_code > IDLE_HITS and (unaided or ages["died"] > HOPELESS):
        lost, peak = ages["peak_alive"] - ages["alive"], ages["peak_alive"]
        said["dying"] = (
            f"step {step}: {lost:,} of the {peak:,} codes that were alive at the peak have had no hit in the last "
            f"{IDLE_HITS} K tokens: the codebook is dying; `steadyvq doctor` on this log names the cause"
        )
    if per_code > STILLBORN_AFTER and ages["peak_alive"] < STILLBORN * num_codes:
        said["stillborn"] = (
            f"step {step}: no more than {ages['peak_alive']:,} of {num_codes:,} codes have ever been in use at once after "
            f"{ages['tokens']:,} tokens: most of the codebook never came alive; `steadyvq doctor` on this log names the cause"
        )
    return said
