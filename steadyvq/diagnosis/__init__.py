# SPDX-License-Identifier: Apache-2.0
"""Why does a codebook die? A monitor for any VQ module, and a doctor that reads its log."""

from steadyvq.diagnosis.adapters import Record, adapt
from steadyvq.diagnosis.callbacks import lightning_callback, transformers_callback
from steadyvq.diagnosis.doctor import Diagnosis, Finding, diagnose
from steadyvq.diagnosis.logs import MonitorLog, read_log
from steadyvq.diagnosis.monitor import Monitor

__all__ = [
    "Diagnosis",
    "Finding",
    "Monitor",
    "MonitorLog",
    "Record",
    "adapt",
    "diagnose",
    "lightning_callback",
    "read_log",
    "transformers_callback",
]
