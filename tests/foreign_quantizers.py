# SPDX-License-Identifier: Apache-2.0
"""Small modules with the call signatures of other projects' vector quantizers, written from their public interfaces."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TamingStyle(nn.Module):
    """taming-transformers, latent-diffusion and diffusers: (B, C, H, W) -> z_q, loss, (perplexity, one_hot, indices)."""

    def __init__(self, n_e: int, e_dim: int, beta: float = 0.25, *, spatial: bool = False) -> None:
        super().__init__()
        self.beta, self.spatial = beta, spatial
        self.remap = None
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        rows = z.permute(0, 2, 3, 1).contiguous()
        indices = torch.cdist(rows.reshape(-1, rows.shape[-1]), self.embedding.weight).argmin(1)
        z_q = self.embedding(indices).view(rows.shape)
        loss = (z_q.detach() - rows).square().mean() + self.beta * (z_q - rows.detach()).square().mean()
        z_q = rows + (z_q - rows).detach()
        found = indices.view(rows.shape[:-1]) if self.spatial else indices
        return z_q.permute(0, 3, 1, 2), loss, (None, None, found)


class LlamaGenStyle(nn.Module):
    """LlamaGen: unit vectors; -> z_q, (losses, usage), (perplexity, one_hot, indices)."""

    def __init__(self, n_e: int, e_dim: int, *, l2_norm: bool = True) -> None:
        super().__init__()
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, float, float], tuple[None, None, Tensor]]:
        rows, table = z.permute(0, 2, 3, 1), self.embedding.weight
        if self.l2_norm:
            rows, table = F.normalize(rows, dim=-1), F.normalize(table, dim=-1)
        indices = torch.cdist(rows.reshape(-1, rows.shape[-1]), table).argmin(1)
        z_q = table[indices].view(rows.shape)
        vq, commit = (z_q - rows.detach()).square().mean(), (z_q.detach() - rows).square().mean()
        return (rows + (z_q - rows).detach()).permute(0, 3, 1, 2), (vq, commit, 0.0, 0.5), (None, None, indices)
