# SPDX-License-Identifier: Apache-2.0
"""Why does a codebook die? A monitor for any VQ module, and a doctor that reads its log."""

from steadyvq.diagnosis.adapters import Record, adapt
from steadyvq.diagnosis.monitor import Monitor

__all__ = ["Monitor", "Record", "adapt"]
