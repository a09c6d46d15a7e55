# SPDX-License-Identifier: Apache-2.0
"""Measures that can be trusted: code usage, image quality, encoder drift, and records with provenance."""

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
