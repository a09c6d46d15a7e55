# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other projects at reduced width, and what these projects compute with them, from the raw names alone.

Names and shapes are facts of the published code:

taming      CompVis/taming-transformers 3ba01b2, taming/modules/diffusionmodules/model.py; taming/models/vqgan.py
llamagen    FoundationVision/LlamaGen 3786e6a, tokenizer/tokenizer_image/vq_model.py
simvq       youngsheen/SimVQ fbc3233, taming/modules/diffusionmodules/improved_model.py; taming/models/vq.py
ibq, lfq    TencentARC/SEED-Voken bb81d65 and a0a83b4, IBQ/models/ibqgan.py, Open_MAGVIT2/models/lfqgan_pretrain.py
fvq         yfChang-cv/FVQ 577b848, qbridge_ViT.py
diffusers   huggingface/diffusers 04a1c9b, src/diffusers/models/autoencoders/vq_model.py, autoencoder_kl.py
kl          CompVis/latent-diffusion a506df5, ldm/models/autoencoder.py; black-forest-labs/flux, src/flux/modules/autoencoder.py
dac         descriptinc/descript-audio-codec 3e877db, dac/nn/quantize.py
encodec     facebookresearch/encodec 01e1cc5, encodec/quantization/core_vq.py
mimi        huggingface/transformers be5087b, models/mimi/modeling_mimi.py; kyutai-labs/moshi, quantization/core_vq.py

The forwards are written from the papers' equations and these names, with plain functions; they share no code with the package.
"""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]


def layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    """A convolution, a linear layer (two numbers) or a norm (one)."""
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


def res_block(name: str, a: int, b: int, skip: str = "nin_shortcut", bias: bool = True) -> Shapes:
    found = layer(f"{name}.norm1", a) | layer(f"{name}.conv1", b, a, 3, 3, bias=bias)
    found |= layer(f"{name}.norm2", b) | layer(f"{name}.conv2", b, b, 3, 3, bias=bias)
    return found | (layer(f"{name}.{skip}", b, a, 1, 1, bias=bias) if a != b else {})


def attention(name: str, c: int, parts: str = "norm q k v proj_out", linear: bool = False) -> Shapes:
    norm, *rest = parts.split()
    found = layer(f"{name}.{norm}", c)
    for part in rest:
        found |= layer(f"{name}.{part}", c, c, *(() if linear else (1, 1)))
    return found


def taming(
    ch: int,
    mult: tuple[int, ...],
    res: int,
    attends: tuple[int, ...],
    z: int,
    dim: int,
    codes: int,
    dialect: str = "taming",
) -> Shapes:
    """VQGAN's keys in one of three dialects; `attends` are the levels with attention."""
    words = {
        "taming": ("down.{}", "up.{}", "block", "attn", "downsample.conv", "upsample.conv", "norm_out", "nin_shortcut"),
        "llamagen": (
            *("conv_blocks.{}", "conv_blocks.{}", "res", "attn"),
            *("downsample.conv", "upsample.conv", "norm_out", "nin_shortcut"),
        ),
        "diffusers": (
            *("down_blocks.{}", "up_blocks.{}", "resnets", "attentions"),
            *("downsamplers.0.conv", "upsamplers.0.conv", "conv_norm_out", "conv_shortcut"),
        ),
    }[dialect]
    down, up, block, attn, shrink, grow, norm_out, skip = words
    mid = {
        "taming": ("mid.block_1", "mid.attn_1", "mid.block_2"),
        "llamagen": ("mid.0", "mid.1", "mid.2"),
        "diffusers": ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    }[dialect]
    kind = {"parts": "group_norm to_q to_k to_v to_out.0", "linear": True} if dialect == "diffusers" else {}
    found: Shapes = {}
    width = ch
    low = ch * mult[-1]
    found |= layer("encoder.conv_in", ch, 3, 3, 3)
    for i, m in enumerate(mult):
        for j in range(res):
            found |= res_block(f"encoder.{down.format(i)}.{block}.{j}", width, ch * m, skip)
            width = ch * m
            if i in attends:
                found |= attention(f"encoder.{down.format(i)}.{attn}.{j}", width, **kind)
        if i < len(mult) - 1:
            found |= layer(f"encoder.{down.format(i)}.{shrink}", width, width, 3, 3)
    for side in ("encoder", "decoder"):
        found |= res_block(f"{side}.{mid[0]}", low, low) | attention(f"{side}.{mid[1]}", low, **kind)
        found |= res_block(f"{side}.{mid[2]}", low, low)
    found |= layer(f"encoder.{norm_out}", low) | layer("encoder.conv_out", z, low, 3, 3)
    found |= layer("decoder.conv_in", low, z, 3, 3)
    for i in reversed(range(len(mult))):
        place = f"decoder.{up.format(i if dialect == 'taming' else len(mult) - 1 - i)}"
        for j in range(res + 1):
            found |= res_block(f"{place}.{block}.{j}", width, ch * mult[i], skip)
            width = ch * mult[i]
            if i in attends:
                found |= attention(f"{place}.{attn}.{j}", width, **kind)
        if i > 0:
            found |= layer(f"{place}.{grow}", width, width, 3, 3)
    found |= layer(f"decoder.{norm_out}", width) | layer("decoder.conv_out", 3, width, 3, 3)
    found |= layer("quant_conv", dim, z, 1, 1) | layer("post_quant_conv", z, dim, 1, 1)
    return found | {"quantize.embedding.weight": (codes, dim)}


def continuous(ch: int, mult: tuple[int, ...], res: int, z: int, dialect: str = "taming", mixed: bool = True) -> Shapes:
    """The keys of a KL autoencoder: twice the channels at the encoder's end, no codebook; FLUX has no 1x1 convolutions."""
    found = taming(ch, mult, res, (), z, z, 1, dialect)
    del found["quantize.embedding.weight"]
    found |= layer("encoder.conv_out", 2 * z, ch * mult[-1], 3, 3)
    if mixed:
        return found | layer("quant_conv", 2 * z, 2 * z, 1, 1)
    return {name: shape for name, shape in found.items() if "quant_conv" not in name}


def magvit(ch: int, mult: tuple[int, ...], res: int, z: int, adaptive: bool = False) -> Shapes:
    """The keys of the autoencoder of Open-MAGVIT2 and SimVQ, without a codebook."""
    found = layer("encoder.conv_in", ch, 3, 3, 3, bias=False)
    width, low = ch, ch * mult[-1]
    for i, m in enumerate(mult):
        for j in range(res):
            found |= res_block(f"encoder.down.{i}.block.{j}", width, ch * m, bias=False)
            width = ch * m
        if i < len(mult) - 1:
            found |= layer(f"encoder.down.{i}.downsample", width, width, 3, 3)
    for side in ("encoder", "decoder"):
        for j in range(res):
            found |= res_block(f"{side}.mid_block.{j}", low, low, bias=False)
    found |= layer("encoder.norm_out", low) | layer("encoder.conv_out", z, low, 1, 1)
    found |= layer("decoder.conv_in", low, z, 3, 3)
    for i in reversed(range(len(mult))):
        if adaptive:
            found |= layer(f"decoder.adaptive.{i}.gamma", width, z) | layer(f"decoder.adaptive.{i}.beta", width, z)
        for j in range(res):
            found |= res_block(f"decoder.up.{i}.block.{j}", width, ch * mult[i], bias=False)
            width = ch * mult[i]
        if i > 0:
            found |= layer(f"decoder.up.{i}.upsample.conv1", 4 * width, width, 3, 3)
    return found | layer("decoder.norm_out", width) | layer("decoder.conv_out", 3, width, 3, 3)


def bridge(dim: int, patch: int, hidden: int, depth: int) -> Shapes:
    """The keys of FVQ's VQBridge."""
    found = layer("x_embedder.proj", hidden, dim, patch, patch)
    for i in range(depth):
        found |= layer(f"blocks.{i}.attn.qkv", 3 * hidden, hidden) | layer(f"blocks.{i}.attn.proj", hidden, hidden)
        found |= layer(f"blocks.{i}.mlp.fc1", 2 * hidden, hidden) | layer(f"blocks.{i}.mlp.fc2", hidden, 2 * hidden)
    found |= layer("final_layer.linear", patch * patch * dim, hidden)
    return {f"quantize.qbridge.{name}": shape for name, shape in found.items()}


def random_state(shapes: Shapes, seed: int = 0) -> State:
    """Weights that keep the size of what goes through them; norms near 1; codes of the size of latents."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            value *= 0.1
        elif len(shape) == 1:
            value = 1 + 0.2 * value
        elif "embedding.weight" not in name:
            value *= math.prod(shape[1:]) ** -0.5
        state[name] = value
    return state


class Raw:
    """What a project computes from a checkpoint's raw names, in float64. Images (B, 3, H, W)."""

    def __init__(self, state: State, dialect: str, groups: int = 32) -> None:
        self.state = {name: value.double() for name, value in state.items()}
        self.dialect, self.groups = dialect, groups

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.state

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, bias, stride, padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        grouped = x.reshape(x.shape[0], self.groups, -1)
        mean, var = grouped.mean(-1, keepdim=True), grouped.var(-1, unbiased=False, keepdim=True)
        flat = ((grouped - mean) / (var + 1e-6).sqrt()).reshape(x.shape)
        if f"{name}.weight" not in self.state:
            return flat
        return flat * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    @staticmethod
    def swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", h)))
        for skip in ("nin_shortcut", "conv_shortcut"):
            if self.has(f"{name}.{skip}"):
                x = self.conv(f"{name}.{skip}", x)
        return x + h

    def attend(self, name: str, x: Tensor) -> Tensor:
        parts = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
        parts = parts if self.dialect == "diffusers" else ("norm", "q", "k", "v", "proj_out")
        b, c, h, w = x.shape
        rows = self.norm(f"{name}.{parts[0]}", x).reshape(b, c, h * w).transpose(1, 2)

        def linear(part: str, rows: Tensor) -> Tensor:
            return rows @ self.state[f"{name}.{part}.weight"].reshape(c, c).t() + self.state[f"{name}.{part}.bias"]

        q, k, v = (linear(part, rows) for part in parts[1:4])
        weights = torch.exp(q @ k.transpose(1, 2) / math.sqrt(c))
        mixed = (weights @ v) / weights.sum(-1, keepdim=True)
        return x + linear(parts[4], mixed).transpose(1, 2).reshape(x.shape)

    def words(self) -> tuple[str, ...]:
        return {
            "taming": ("down.{}", "up.{}", "block", "attn", "downsample.conv", "upsample.conv", "norm_out"),
            "magvit": ("down.{}", "up.{}", "block", "attn", "downsample", "upsample.conv1", "norm_out"),
            "llamagen": (
                "conv_blocks.{}",
                "conv_blocks.{}",
                "res",
                "attn",
                "downsample.conv",
                "upsample.conv",
                "norm_out",
            ),
            "diffusers": (
                *("down_blocks.{}", "up_blocks.{}", "resnets", "attentions"),
                *("downsamplers.0.conv", "upsamplers.0.conv", "conv_norm_out"),
            ),
        }[self.dialect]

    def blocks(self, place: str, block: str, attn: str, x: Tensor) -> Tensor:
        j = 0
        while self.has(f"{place}.{block}.{j}.conv1"):
            x = self.block(f"{place}.{block}.{j}", x)
            if any(name.startswith(f"{place}.{attn}.{j}.") for name in self.state):
                x = self.attend(f"{place}.{attn}.{j}", x)
            j += 1
        return x

    def middle(self, side: str, x: Tensor) -> Tensor:
        if self.dialect == "magvit":
            return self.blocks(side, "mid_block", "none", x)
        first, attn, last = {
            "taming": ("mid.block_1", "mid.attn_1", "mid.block_2"),
            "llamagen": ("mid.0", "mid.1", "mid.2"),
            "diffusers": ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
        }[self.dialect]
        x = self.block(f"{side}.{first}", x)
        if any(name.startswith(f"{side}.{attn}.") for name in self.state):
            x = self.attend(f"{side}.{attn}", x)
        return self.block(f"{side}.{last}", x)

    def latents(self, images: Tensor) -> Tensor:
        down, _, block, attn, shrink, _, norm_out = self.words()
        x = self.conv("encoder.conv_in", images.double())
        i = 0
        while self.has(f"encoder.{down.format(i)}.{block}.0.conv1"):
            x = self.blocks(f"encoder.{down.format(i)}", block, attn, x)
            name = f"encoder.{down.format(i)}.{shrink}"
            if self.has(name) and self.dialect == "magvit":
                x = self.conv(name, x, stride=2, padding=1)
            elif self.has(name):
                x = self.conv(name, F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
            i += 1
        x = self.swish(self.norm(f"encoder.{norm_out}", self.middle("encoder", x)))
        x = self.conv("encoder.conv_out", x)
        return self.conv("quant_conv", x) if self.has("quant_conv") else x

    def images(self, codes: Tensor) -> Tensor:
        _, up, block, attn, _, grow, norm_out = self.words()
        z = self.conv("post_quant_conv", codes) if self.has("post_quant_conv") else codes
        x = self.middle("decoder", self.conv("decoder.conv_in", z))
        levels = 0
        while self.has(f"decoder.{up.format(levels)}.{block}.0.conv1"):
            levels += 1
        for n in range(levels):
            i = n if self.dialect in ("llamagen", "diffusers") else levels - 1 - n
            place = f"decoder.{up.format(i)}"
            if self.has(f"decoder.adaptive.{i}.gamma"):
                x = self.adaptive(f"decoder.adaptive.{i}", x, z)
            x = self.blocks(place, block, attn, x)
            if self.has(f"{place}.{grow}"):
                x = self.double(f"{place}.{grow}", x)
        return self.conv("decoder.conv_out", self.swish(self.norm(f"decoder.{norm_out}", x)))

    def double(self, name: str, x: Tensor) -> Tensor:
        if self.dialect != "magvit":
            return self.conv(name, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        wide = self.conv(name, x)
        b, c, h, w = wide.shape
        out = wide.new_zeros(b, c // 4, 2 * h, 2 * w)
        for row in range(2):
            for column in range(2):
                begin = (2 * row + column) * (c // 4)
                out[:, :, row::2, column::2] = wide[:, begin : begin + c // 4]
        return out

    def adaptive(self, name: str, x: Tensor, z: Tensor) -> Tensor:
        flat = z.flatten(2)
        spread = ((flat - flat.mean(-1, keepdim=True)).square().sum(-1) / (flat.shape[-1] - 1) + 1e-6).sqrt()
        scale = spread @ self.state[f"{name}.gamma.weight"].t() + self.state[f"{name}.gamma.bias"]
        shift = flat.mean(-1) @ self.state[f"{name}.beta.weight"].t() + self.state[f"{name}.beta.bias"]
        return scale[..., None, None] * self.norm("none", x) + shift[..., None, None]

    def table(self, method: str) -> Tensor:
        """The codes as the project looks them up."""
        rows = self.state["quantize.embedding.weight"]
        if method == "sphere":
            return rows / rows.square().sum(-1, keepdim=True).sqrt()
        if method == "simvq":
            return rows @ self.state["quantize.embedding_proj.weight"].t() + self.state["quantize.embedding_proj.bias"]
        return self.bridged(rows) if method == "bridge" else rows

    def bridged(self, rows: Tensor) -> Tensor:
        s = {name.removeprefix("quantize.qbridge."): v for name, v in self.state.items() if ".qbridge." in name}
        (codes, dim), side = rows.shape, math.isqrt(rows.shape[0])
        weight = s["x_embedder.proj.weight"]
        patch, hidden = weight.shape[-1], weight.shape[0]
        x = F.conv2d(rows.t().reshape(1, dim, side, side), weight, s["x_embedder.proj.bias"], stride=patch)
        x = x.flatten(2)[0].t()

        def plain(x: Tensor) -> Tensor:
            return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

        def linear(name: str, x: Tensor) -> Tensor:
            return x @ s[f"{name}.weight"].t() + s[f"{name}.bias"]

        i = 0
        while f"blocks.{i}.attn.qkv.weight" in s:
            q, k, v = linear(f"blocks.{i}.attn.qkv", plain(x)).split(hidden, -1)
            heads = []
            for h in range(4):
                part = slice(h * hidden // 4, (h + 1) * hidden // 4)
                heads.append(torch.softmax(q[:, part] @ k[:, part].t() / math.sqrt(hidden // 4), -1) @ v[:, part])
            x = x + linear(f"blocks.{i}.attn.proj", torch.cat(heads, -1))
            wide = linear(f"blocks.{i}.mlp.fc1", plain(x))
            wide = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
            x = x + linear(f"blocks.{i}.mlp.fc2", wide)
            i += 1
        out = linear("final_layer.linear", plain(x))
        table = rows.new_zeros(side, side, dim)
        for t in range(out.shape[0]):
            row, column = divmod(t, side // patch)
            square = out[t].reshape(patch, patch, dim)
            table[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = square
        return table.reshape(codes, dim)

    def mean(self, images: Tensor) -> Tensor:
        """Of the normal distribution that a KL autoencoder's encoder gives: the first half of the moments."""
        return self.latents(images).chunk(2, 1)[0]

    def run(self, images: Tensor, method: str) -> tuple[Tensor, Tensor]:
        """Tokens (B, h, w) and images, not clamped."""
        z = self.latents(images)
        rows = z.movedim(1, -1)
        if method == "bits":
            tokens = sum(((rows[..., b] > 0).long() << b) for b in range(rows.shape[-1]))
            codes = torch.where(rows > 0, 1.0, -1.0).double()
        else:
            table = self.table(method)
            seen = rows / rows.square().sum(-1, keepdim=True).sqrt() if method == "sphere" else rows
            if method == "dot":
                tokens = (rows @ table.t()).argmax(-1)
            else:
                tokens = (seen[..., None, :] - table).square().sum(-1).argmin(-1)
            codes = table[tokens]
        return tokens, self.images(codes.movedim(-1, 1))


def save_kl(path: Path) -> State:
    """A small checkpoint of a KL autoencoder as latent diffusion's trainer leaves it."""
    state = random_state(continuous(32, (1, 2), 2, 4))
    extra = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}
    torch.save({"epoch": 3, "state_dict": {**state, **extra}}, path)
    return state


def save_taming(path: Path, **more: object) -> State:
    """A small checkpoint as taming's trainer leaves it; returns the tokenizer's tensors."""
    state = random_state(taming(32, (1, 2), 2, (1,), 8, 4, 64))
    extra = {"loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4), "loss.logvar": torch.zeros(())}
    torch.save({"epoch": 3, "global_step": 9, "state_dict": {**state, **extra}, **more}, path)
    return state
