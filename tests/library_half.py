# SPDX-License-Identifier: Apache-2.0
"""Runs the four lines of the README from the built wheel with nothing importable but torch and safetensors.

    pip wheel --no-deps -w FOLDER . && python tests/library_half.py FOLDER

The wheel is put first on the path; every other third-party package is hidden, as on a machine that lacks it.
"""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

HIDDEN = {"PIL", "yaml", "rich", "lightning_fabric", "torchmetrics", "jaxtyping", "mvtbdata", "lightning_utilities"}


class Hide(MetaPathFinder):
    """Refuses the training half's packages."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"{name} is hidden: the library half must not need it")


def main(folder: Path) -> None:
    (wheel,) = folder.glob("steadyvq-*.whl")
    sys.path.insert(0, str(wheel))
    sys.meta_path.insert(0, Hide())
    import torch

    import steadyvq

    assert str(wheel) in steadyvq.__file__, "the wheel is tested, not the checkout"
    latents = torch.randn(4, 64, 16, 16, requires_grad=True)
    vq = steadyvq.build_quantizer("nsvq", num_codes=1024, dim=64, channel_axis=1)
    optimizer = torch.optim.Adam(vq.parameters(), lr=1e-2)
    out = vq(latents)
    (out.z_q.square().mean() + out.loss).backward()
    optimizer.step()
    vq.update(out, optimizer=optimizer)
    assert latents.grad is not None
    assert steadyvq.list_quantizers()
    print(f"{wheel.name}: the four lines run with torch and safetensors alone")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
