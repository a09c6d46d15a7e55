# SPDX-License-Identifier: Apache-2.0
"""SteadyVQ: discrete tokenizers whose whole codebook stays in use.

    vq = steadyvq.build_quantizer("nsvq", num_codes=1024, dim=64, channel_axis=1)
    out = vq(latents)                       # z_q, indices, loss = out
    (reconstruction_loss + out.loss).backward(); optimizer.step()
    vq.update(out, optimizer=optimizer)

The public names are imported on first use, so that `import steadyvq` and the command line's `--help` stay cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "across_processes": "steadyvq.quantizers",
    "build_quantizer": "steadyvq.quantizers",
    "list_quantizers": "steadyvq.quantizers",
    "Monitor": "steadyvq.diagnosis",
    "Quantizer": "steadyvq.quantizers",
    "Quantized": "steadyvq.quantizers",
    "Tokenizer": "steadyvq.models",
    "Schedule": "steadyvq.training.stages",
    "Stage": "steadyvq.training.stages",
    "Until": "steadyvq.training.stages",
}
__all__ = [
    "Monitor",
    "Quantized",
    "Quantizer",
    "Schedule",
    "Stage",
    "Tokenizer",
    "Until",
    "__version__",
    "across_processes",
    "build_quantizer",
    "list_quantizers",
]

if TYPE_CHECKING:
    from steadyvq.diagnosis import Monitor
    from steadyvq.models import Tokenizer
    from steadyvq.quantizers import Quantized, Quantizer, across_processes, build_quantizer, list_quantizers
    from steadyvq.training.stages import Schedule, Stage, Until


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'steadyvq' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
