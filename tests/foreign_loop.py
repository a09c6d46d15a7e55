# SPDX-License-Identifier: Apache-2.0
"""A training loop of another project's shape, and NSVQ's schedule around it: python tests/foreign_loop.py PHOTOS RESULT.

The loop is that of LlamaGen's tokenizer: a model with its own quantizer, a loss module that owns the discriminator and balances
it by the gradients of the last layer, an optimiser and a gradient scaler for each side, averaged weights in a copy of the
model. The lines that end in `# nsvq` are all that is added; without them it trains plain vector quantization.
"""

import copy
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from steadyvq import build_quantizer  # nsvq
from steadyvq.training.stages import Schedule, Until, nsvq_stages  # nsvq

EPOCHS, BATCH, SIDE, DIM, CODES, DISC_WEIGHT = 14, 8, 32, 8, 64, 0.5


class VectorQuantizer(nn.Module):
    """Nearest code, straight through, as everybody has it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CODES, DIM)
        self.embedding.weight.data.uniform_(-1 / CODES, 1 / CODES)

    def forward(self, z):
        rows = z.movedim(1, -1)
        indices = torch.cdist(rows.flatten(0, -2), self.embedding.weight).argmin(-1).view(rows.shape[:-1])
        z_q = self.embedding(indices)
        loss = (z_q - rows.detach()).square().mean() + 0.25 * (z_q.detach() - rows).square().mean()
        return (rows + (z_q - rows).detach()).movedim(-1, 1), loss, indices


class Nsvq(nn.Sequential):  # nsvq
    def forward(self, z):  # nsvq
        self.out = self[0](z)  # nsvq
        return self.out.z_q, self.out.loss, self.out.indices  # nsvq


class VQModel(nn.Module):
    def __init__(self):
        super().__init__()
        act = nn.SiLU()
        self.encoder = nn.Sequential(nn.Conv2d(3, 32, 4, 4), act, nn.Conv2d(32, 32, 3, 1, 1), act, nn.Conv2d(32, 16, 1))
        self.decoder = nn.Sequential(
            *(nn.Conv2d(16, 64, 3, 1, 1), act, nn.Conv2d(64, 128, 3, 1, 1), act, nn.PixelShuffle(4)),
            nn.Conv2d(8, 3, 3, 1, 1),
        )
        self.quant_conv, self.post_quant_conv = nn.Conv2d(16, DIM, 1), nn.Conv2d(DIM, 16, 1)
        self.quantize = VectorQuantizer()

    def encode(self, x):
        return self.quantize(self.quant_conv(self.encoder(x)))

    def forward(self, x):
        quant, emb_loss, _ = self.encode(x)
        return self.decoder(self.post_quant_conv(quant)), emb_loss


class VQLoss(nn.Module):
    def __init__(self):
        super().__init__()
        widths = (3, 16, 32)
        layers = [(nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(0.2)) for a, b in pairwise(widths)]
        self.discriminator = nn.Sequential(*(part for pair in layers for part in pair), nn.Conv2d(32, 1, 4, 1, 1))
        self.disc_weight = DISC_WEIGHT

    def generator(self, emb_loss, x, made, last_layer):
        rec_loss = (x - made).abs().mean()
        adv_loss = -self.discriminator(made).mean()
        by_rec, by_adv = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (rec_loss, adv_loss))
        adaptive = (by_rec.norm() / (by_adv.norm() + 1e-6)).clamp(0, 1e4).detach()
        return rec_loss + adaptive * self.disc_weight * adv_loss + emb_loss, rec_loss

    def critic(self, x, made):
        real, fake = self.discriminator(x), self.discriminator(made.detach())
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


@torch.no_grad()
def update_ema(ema, model, decay=0.9):
    for shadow, live in zip(ema.parameters(), model.parameters(), strict=True):
        shadow.lerp_(live, 1 - decay)
    for shadow, live in zip(ema.buffers(), model.buffers(), strict=True):
        shadow.copy_(live)


def load(folder):
    """Tiles (N, 3, SIDE, SIDE) in [-1, 1]."""
    tiles = []
    for path in sorted(p for p in Path(folder).rglob("*.*") if p.is_file()):
        pixels = bytearray(Image.open(path).convert("RGB").resize((128, 96)).tobytes())
        picture = torch.frombuffer(pixels, dtype=torch.uint8).view(96, 128, 3).permute(2, 0, 1).float() / 127.5 - 1
        tiles += picture.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE).reshape(3, -1, SIDE, SIDE).unbind(1)
    return torch.stack(tiles)


def step(scaler, optimizer, loss, parameters):
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    scaler.step(optimizer)
    scaler.update()


def main(folder, result):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, history = load(folder), []
    model, vq_loss = VQModel(), VQLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    vq = build_quantizer("nsvq", num_codes=CODES, dim=DIM, channel_axis=1)  # nsvq
    model.quantize = Nsvq(vq)  # nsvq
    optimizer.add_param_group({"params": vq.parameters(), "lr": 2e-2})  # nsvq
    parts = {"encoder": [model.encoder, model.quant_conv], "discriminator": [vq_loss.discriminator]}  # nsvq
    schedule = Schedule(nsvq_stages(Until("commitment", 1, min_epochs=2, max_epochs=8), adversarial_ramp=2.0))  # nsvq
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    schedule.apply(parts, vq)  # nsvq
    optimizer_disc = torch.optim.Adam(vq_loss.discriminator.parameters(), lr=1e-3, betas=(0.9, 0.95))
    scaler, scaler_disc = torch.amp.GradScaler("cpu", init_scale=256.0), torch.amp.GradScaler("cpu", init_scale=256.0)
    steps = len(images) // BATCH
    for epoch in range(EPOCHS):
        order, commitment = torch.randperm(len(images)), 0.0
        for i in range(steps):
            x = images[order[i * BATCH : (i + 1) * BATCH]]
            vq_loss.disc_weight = schedule.weight("adversarial", DISC_WEIGHT, within=(i + 1) / steps)  # nsvq
            with torch.autocast("cpu", dtype=torch.bfloat16):
                made, emb_loss = model(x)
            total, rec_loss = vq_loss.generator(emb_loss, x, made.float(), model.decoder[-1].weight)
            step(scaler, optimizer, total, model.parameters())
            commitment += float(model.quantize.out.losses.get("commitment", 0)) / steps  # nsvq
            vq.update(model.quantize.out, optimizer)  # nsvq
            update_ema(ema, model)
            history.append({"epoch": epoch, "rec": float(rec_loss.detach()), "weight": vq_loss.disc_weight})
            history[-1] |= snapshot(model, ema, vq_loss, images[:4])
            if not vq_loss.disc_weight:  # nsvq
                continue  # nsvq
            step(scaler_disc, optimizer_disc, vq_loss.critic(x, made.float()), vq_loss.discriminator.parameters())
        if schedule.step(epoch + 1, EPOCHS, {"commitment": commitment}):  # nsvq
            schedule.apply(parts, vq)  # nsvq
            ema.load_state_dict(model.state_dict())  # nsvq
    with torch.no_grad():
        used = len(ema.encode(images)[2].unique())
    torch.save({"history": history, "used": used}, result)


@torch.no_grad()
def snapshot(model, ema, vq_loss, images):
    """What a test wants to know of a step: latents of a probe batch, live and averaged, and what moves."""
    latents = {name: module.quant_conv(module.encoder(images)) for name, module in (("live", model), ("ema", ema))}
    return latents | {
        "discriminator": vq_loss.discriminator[0].weight.clone(),
        "decoder": model.decoder[-1].weight.clone(),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
