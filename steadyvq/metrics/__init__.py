# SPDX-License-Identifier: Apache-2.0
"""Measures that can be trusted: code usage, image quality, encoder drift, and records with provenance.

Names are imported on first use: `usage` and `drift` need torch alone, and a monitor must not ask for more.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steadyvq.metrics.drift import Probe, assignment_churn, encoder_drift, relative_quantisation_error
    from steadyvq.metrics.frechet import (
        FeatureDistance,
        FeatureReport,
        FeatureStatistics,
        KernelDistance,
        frechet_distance,
        kernel_distance,
        paired_kernel_distance,
    )
    from steadyvq.metrics.image import Estimate, ImageQuality, QualityReport, estimate, psnr, ssim, to_uint8
    from steadyvq.metrics.protocol import compare_records, conditions, differences, protocol_id, refuse_unlike
    from steadyvq.metrics.record import EvaluationRecord, read_record, write_record
    from steadyvq.metrics.usage import UsageMeter, UsageReport, uniform_utilization

_HOME = {
    "Probe": "drift",
    "assignment_churn": "drift",
    "encoder_drift": "drift",
    "relative_quantisation_error": "drift",
    "FeatureDistance": "frechet",
    "FeatureReport": "frechet",
    "FeatureStatistics": "frechet",
    "KernelDistance": "frechet",
    "frechet_distance": "frechet",
    "kernel_distance": "frechet",
    "paired_kernel_distance": "frechet",
    "Estimate": "image",
    "ImageQuality": "image",
    "QualityReport": "image",
    "estimate": "image",
    "psnr": "image",
    "ssim": "image",
    "to_uint8": "image",
    "compare_records": "protocol",
    "conditions": "protocol",
    "differences": "protocol",
    "protocol_id": "protocol",
    "refuse_unlike": "protocol",
    "EvaluationRecord": "record",
    "read_record": "record",
    "write_record": "record",
    "UsageMeter": "usage",
    "UsageReport": "usage",
    "uniform_utilization": "usage",
}

__all__ = [
    "Estimate",
    "EvaluationRecord",
    "FeatureDistance",
    "FeatureReport",
    "FeatureStatistics",
    "ImageQuality",
    "KernelDistance",
    "Probe",
    "QualityReport",
    "UsageMeter",
    "UsageReport",
    "assignment_churn",
    "compare_records",
    "conditions",
    "differences",
    "encoder_drift",
    "estimate",
    "frechet_distance",
    "kernel_distance",
    "paired_kernel_distance",
    "protocol_id",
    "psnr",
    "read_record",
    "refuse_unlike",
    "relative_quantisation_error",
    "ssim",
    "to_uint8",
    "uniform_utilization",
    "write_record",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'steadyvq.metrics' has no attribute {name!r}")
    return getattr(import_module(f"steadyvq.metrics.{_HOME[name]}"), name)
