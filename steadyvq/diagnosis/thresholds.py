# SPDX-License-Identifier: Apache-2.0
"""Every threshold of the monitor's warnings and of the doctor, in one place.

They were chosen on development runs (`python -m steadyvq.experiments.doctor --runs development`: seeds, codebook sizes and
rates of their own) and left alone since; the runs of docs/evidence/doctor.json, which names the hash of this file, were made
afterwards.
"""

IDLE_HITS = 20
"""A code is dead when it has had no hit in the last IDLE_HITS * K tokens: under uniform use it would have had 20."""

DYING, HOPELESS = 0.3, 0.6
"""Share of the codes alive at the peak that have died since; above the first the monitor warns if no dead code is being
revived, above the second in any case."""

JUMP, JUMP_OF_SPREAD = 5.0, 0.25
"""A dead code is revived where it moves by JUMP times what codes that learn do, and by JUMP_OF_SPREAD of their spread."""

STILLBORN = 0.25
"""Share of K; a codebook whose peak is below it is stillborn ..."""

STILLBORN_AFTER = 60
"""... once this many tokens per code have gone by."""

LOST, FEW = 0.3, 0.6
"""At the end of a log a codebook suffers if it has lost more of its peak, or fewer codes are alive, as a share of K."""

TOKENS_PER_CODE = 50
"""Tokens for each code in the whole log; below, there are too few for K."""

MISSED_SHARE = 0.01
"""Share of look-ups that miss a nearer code, in half precision."""

DUPLICATES = 0.05
"""Share of codes that lie on another one."""

AT_START = 10
"""The first row must be of one of the first steps to say anything of the start."""

NORM_LOW, NORM_HIGH = 0.2, 5.0
"""Bounds of code length over latent length at the start."""

STEP_PER_DRIFT = 0.2
"""Step of a code at a hit over the drift between two hits; below, codes are too slow."""

MASS_HIGH = 0.95
"""Share of the softmax mass at the winner; above, tau is too small."""

LOSERS_SHARE = 0.7
"""Effective losers over K - 1; above, tau is too large."""

ROWS_BEFORE, ROWS_AFTER = 3, 4
"""Rows of the log before and after an event that are compared."""

FREEZE_PACE = 0.018
"""Drift per step over the spread of latents just before the encoder is frozen; above, it had not learned."""

SHOCK = 1.2
"""Reconstruction loss after the discriminator's start over that before; above, it is a shock."""
