# SPDX-License-Identifier: Apache-2.0
"""Weights of other packages in our quantizers; none of these packages is needed for it."""

from steadyvq.interop.vector_quantize_pytorch import from_vector_quantize_pytorch

__all__ = ["from_vector_quantize_pytorch"]
