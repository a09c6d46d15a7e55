# SPDX-License-Identifier: Apache-2.0
"""Weights of other packages in our quantizers and tokenizers, and ours in theirs; none of these packages is needed for it."""

from steadyvq.interop.audio import from_dac, from_encodec, from_mimi
from steadyvq.interop.checkpoints import Imported, import_tokenizer
from steadyvq.interop.continuous import ImportedAutoencoder, import_autoencoder, import_checkpoint
from steadyvq.interop.exports import EXPORTS, export_tokenizer
from steadyvq.interop.formats import CONTINUOUS, FORMATS
from steadyvq.interop.vector_quantize_pytorch import from_vector_quantize_pytorch

__all__ = [
    "CONTINUOUS",
    "EXPORTS",
    "FORMATS",
    "Imported",
    "ImportedAutoencoder",
    "export_tokenizer",
    "from_dac",
    "from_encodec",
    "from_mimi",
    "from_vector_quantize_pytorch",
    "import_autoencoder",
    "import_checkpoint",
    "import_tokenizer",
]
