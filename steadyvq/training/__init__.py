# SPDX-License-Identifier: Apache-2.0
"""Training: stages as data, a loop that knows tasks but no tokenizers, checkpoints, configurations."""
