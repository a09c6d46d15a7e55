# SPDX-License-Identifier: Apache-2.0
"""Every threshold of the monitor's warnings and of the doctor, in one place.

They were chosen on development runs (seeds, codebook sizes and rates of their own) and then left alone: the runs of
docs/evidence/doctor.json were made afterwards.
"""

IDLE_HITS = 20
"""A code is dead when it has had no hit in the last IDLE_HITS * K tokens: under uniform use it would have had 20."""

DYING = 0.25
"""Share of the codes alive at the peak that have died since; above, the monitor warns."""

STILLBORN = 0.25
"""Share of K; a codebook whose peak is below it is stillborn ..."""

STILLBORN_AFTER = 60
"""... once this many tokens per code have gone by."""
