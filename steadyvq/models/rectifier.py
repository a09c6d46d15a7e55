# SPDX-License-Identifier: Apache-2.0
"""A rectifier: a small network that maps codes back to latents, before a decoder that was trained on latents.

    z' = z_q + f(z_q)

Source: ReVQ, "Quantize-then-Rectify" (arXiv 2507.10547), where it is trained by |z - z'|^2 with everything else frozen.

Differs from the source: f is convolutions and residual blocks instead of EfficientViT blocks, and its last layer starts at
0, so that a fresh rectifier changes nothing.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from steadyvq.models.blocks import Blocks, group_norm, res_blocks


class Rectifier(nn.Module):
    """Codes on a grid to latents on the same grid.

    Args:
        dim: features of a code.
        width: channels inside.
        blocks: residual blocks, at least 1.
        groups: of the norms; None: as many as fit the width.
    """

    def __init__(self, dim: int, width: int, blocks: int, groups: int | None = None) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(dim, width, 3, padding=1)
        self.blocks = Blocks(*res_blocks(width, width, blocks, groups=groups))
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, dim, 1)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """Map (B, dim, h, w) to the same shape."""
        hidden = self.blocks(self.conv_in(codes))
        change: Tensor = self.conv_out(F.silu(self.norm_out(hidden)))
        return codes + change
