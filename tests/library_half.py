# SPDX-License-Identifier: Apache-2.0
"""Runs the README's first Python block where only torch and safetensors are installed beside our wheel.

python tests/library_half.py        with an interpreter that has torch, safetensors and the wheel (--no-deps)
"""

import importlib.util
import re
from pathlib import Path

TRAINING_HALF = ("numpy", "PIL", "yaml", "rich", "lightning_fabric", "torchmetrics", "jaxtyping", "mvtbdata")


def main() -> None:
    present = [name for name in TRAINING_HALF if importlib.util.find_spec(name) is not None]
    assert not present, f"{present} must be absent for this check to mean anything"
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (lines, *_) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    scope: dict[str, object] = {}
    exec(lines, scope)
    import steadyvq

    assert "site-packages" in str(steadyvq.__file__), "the wheel is tested, not the checkout"
    assert scope["vq"].codebook().isfinite().all()
    steadyvq.Tokenizer  # noqa: B018  the models need no more either
    print("the README's lines run with torch and safetensors alone")


if __name__ == "__main__":
    main()
