# SPDX-License-Identifier: Apache-2.0
"""The autoencoder's layout and sizes; the tokenizer's round trips, saved folders and refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steadyvq.models import AUTOENCODERS, AutoencoderConfig, Decoder, Encoder, Tokenizer, autoencoder_config
from steadyvq.models.blocks import ResBlock, group_count
from steadyvq.quantizers import build_quantizer

TINY = AutoencoderConfig(channels=8, multipliers=(1, 2), num_res_blocks=1, num_mid_blocks=1, z_channels=12)


def tiny(dim: int = 12, **overrides: object) -> Tokenizer:
    torch.manual_seed(0)
    quantizer = build_quantizer("vq", num_codes=16, dim=dim, channel_axis=1, **overrides)
    return Tokenizer.build(TINY, quantizer).eval()


def images(batch: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def conv_count(inputs: int, outputs: int, side: int, bias: bool) -> int:
    return inputs * outputs * side * side + (outputs if bias else 0)


def block_count(inputs: int, outputs: int) -> int:
    norms = 2 * inputs + 2 * outputs
    skip = conv_count(inputs, outputs, 1, False) if inputs != outputs else 0
    return norms + conv_count(inputs, outputs, 3, False) + conv_count(outputs, outputs, 3, False) + skip


def test_full_size_has_the_published_layout():
    """Counted by hand from the description of the layout: 24.3 M and 39.9 M parameters."""
    with torch.device("meta"):
        encoder, decoder = autoencoder_config("simvq_f8").build()
        latents = encoder(torch.empty(1, 3, 128, 128))
        assert latents.shape == (1, 128, 16, 16)
        assert decoder(latents).shape == (1, 3, 128, 128)

    encoder_blocks = [(128, 128)] * 2 + [(128, 256), (256, 256)] + [(256, 256)] * 2 + [(256, 512), (512, 512)]
    expected = conv_count(3, 128, 3, False) + sum(block_count(*b) for b in encoder_blocks + [(512, 512)] * 2)
    expected += sum(conv_count(width, width, 3, True) for width in (128, 256, 256))
    expected += 2 * 512 + conv_count(512, 128, 1, True)
    assert parameter_count(encoder) == expected == 24_282_496

    decoder_blocks = [(512, 512)] * 2 + [(512, 256), (256, 256)] + [(256, 256)] * 2 + [(256, 128), (128, 128)]
    expected = conv_count(128, 512, 3, True) + sum(block_count(*b) for b in [(512, 512)] * 2 + decoder_blocks)
    expected += sum(conv_count(width, 4 * width, 3, True) for width in (512, 256, 256))
    expected += 2 * 128 + conv_count(128, 3, 3, True)
    assert parameter_count(decoder) == expected == 39_851_907


def test_full_size_is_convolutions_and_norms_only():
    with torch.device("meta"):
        models = autoencoder_config("simvq_f8").build()
    leaves = [module for model in models for module in model.modules() if not list(module.children())]
    assert {type(leaf) for leaf in leaves} == {nn.Conv2d, nn.GroupNorm, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle}
    blocks = [module for model in models for module in model.modules() if isinstance(module, ResBlock)]
    assert len(blocks) == 2 * (4 * 2 + 2)
    assert all(conv.bias is None for block in blocks for conv in block.modules() if isinstance(conv, nn.Conv2d))
    assert all(leaf.num_groups == 32 and leaf.eps == 1e-6 for leaf in leaves if isinstance(leaf, nn.GroupNorm))


def test_res_block_is_its_definition():
    torch.manual_seed(0)
    block = ResBlock(8, 12)
    x = torch.randn(2, 8, 5, 7)
    swish = lambda value: value * torch.sigmoid(value)  # noqa: E731
    hidden = nn.functional.group_norm(x, 2, block.norm1.weight, block.norm1.bias, eps=1e-6)
    hidden = nn.functional.conv2d(swish(hidden), block.conv1.weight, padding=1)
    hidden = nn.functional.group_norm(hidden, 3, block.norm2.weight, block.norm2.bias, eps=1e-6)
    hidden = nn.functional.conv2d(swish(hidden), block.conv2.weight, padding=1)
    expected = nn.functional.conv2d(x, block.skip.weight) + hidden
    torch.testing.assert_close(block(x), expected)


def test_source_upsampling_weights_convert_as_the_docstring_says():
    """Depth-to-space of the source reads channels as (2, 2, C); PixelShuffle reads them as (C, 2, 2)."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, 3, 5), torch.randn(24, 6, 3, 3)
    y = nn.functional.conv2d(x, weight, padding=1)
    expected = torch.empty(2, 6, 6, 10)
    for dy in range(2):
        for dx in range(2):
            first = (2 * dy + dx) * 6
            expected[:, :, dy::2, dx::2] = y[:, first : first + 6]
    converted = weight.unflatten(0, (4, 6)).transpose(0, 1).flatten(0, 1)
    ours = nn.functional.pixel_shuffle(nn.functional.conv2d(x, converted, padding=1), 2)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("channels", "groups"), [(512, 32), (128, 32), (48, 12), (32, 8), (16, 4), (12, 3), (6, 1), (1, 1)]
)
def test_group_count(channels, groups):
    assert group_count(channels) == groups


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_named_sizes_keep_any_multiple_of_their_downsampling(name):
    config = autoencoder_config(name)
    factor = int(name.rpartition("_f")[2])
    with torch.device("meta"):
        encoder, decoder = config.build()
        latents = encoder(torch.empty(2, 3, 3 * factor, 5 * factor))
        assert latents.shape == (2, config.z_channels, 3, 5)
        assert decoder(latents).shape == (2, 3, 3 * factor, 5 * factor)
    assert config.downsampling == encoder.downsampling == decoder.downsampling == factor


def test_sizes_refuse_in_one_sentence():
    with pytest.raises(ValueError, match="Did you mean small_f4"):
        autoencoder_config("smal_f4")
    with pytest.raises(ValueError, match="multipliers is"):
        AutoencoderConfig(multipliers=())
    with pytest.raises(ValueError, match="multipliers is"):
        AutoencoderConfig(multipliers=(1, 0))
    with pytest.raises(ValueError, match=r"num_res_blocks is 0, .* at least 1"):
        AutoencoderConfig(num_res_blocks=0)
    with pytest.raises(ValueError, match=r"channels is 1\.5"):
        AutoencoderConfig(channels=1.5)
    with pytest.raises(ValueError, match="layout is 'unet'"):
        AutoencoderConfig(layout="unet")
    with pytest.raises(ValueError, match="mid_attention is True, but the layout 'simvq'"):
        AutoencoderConfig(mid_attention=True)
    with pytest.raises(ValueError, match="patch is 2, but the layout 'vqgan'"):
        AutoencoderConfig(layout="vqgan", patch=2)
    with pytest.raises(ValueError, match="levels, from 0 to 3"):
        AutoencoderConfig(layout="vqgan", attention=(4,))
    with pytest.raises(ValueError, match="groups is 0"):
        AutoencoderConfig(groups=0)
    with pytest.raises(ValueError, match="groups is 3, but a layer has 8 channels"):
        AutoencoderConfig(channels=8, groups=3).build()
    with pytest.raises(ValueError, match="projection is false"):
        Tokenizer.build(
            AutoencoderConfig(8, (1, 2), z_channels=6, projection=False),
            build_quantizer("vq", num_codes=8, dim=4, channel_axis=1),
        )
    assert AutoencoderConfig(multipliers=[1, 2]) == AutoencoderConfig(multipliers=(1, 2))


@pytest.mark.parametrize("dim", [12, 5])
def test_decode_of_encode_is_the_reconstruction(dim):
    tokenizer = tiny(dim)
    x = images(3, 16, 24)
    reconstruction, quantized = tokenizer(x)
    indices = tokenizer.encode(x)
    assert indices.shape == (3, 8, 12)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, quantized.indices)
    assert torch.equal(tokenizer.decode(indices), reconstruction.clamp(-1, 1))
    assert tokenizer.latents(x).shape == (3, dim, 8, 12)


def test_decode_clamps_and_training_does_not():
    tokenizer = tiny()
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias.fill_(3.0)
    reconstruction, quantized = tokenizer(images())
    assert reconstruction.max() > 1
    assert tokenizer.decode(quantized.indices).max() == 1
    assert not tokenizer.decode(quantized.indices).requires_grad


def test_projections_exist_only_where_the_sizes_differ():
    assert parameter_count(tiny(12).pre_quant) == parameter_count(tiny(12).post_quant) == 0
    assert parameter_count(tiny(5).pre_quant) == conv_count(12, 5, 1, True)
    assert parameter_count(tiny(5).post_quant) == conv_count(5, 12, 1, True)


def test_parts_hold_every_parameter_once_and_pre_quant_with_the_encoder():
    tokenizer = tiny(5)
    parts = tokenizer.parts()
    assert set(parts) == {"encoder", "quantizer", "rectifier", "decoder"}
    held = [id(p) for modules in parts.values() for module in modules for p in module.parameters()]
    assert sorted(held) == sorted(id(p) for p in tokenizer.parameters())
    for module in parts["encoder"]:
        module.requires_grad_(False)
    reconstruction, quantized = tokenizer.train()(images())
    (reconstruction.square().mean() + quantized.loss).backward()
    trained = {name.split(".")[0] for name, p in tokenizer.named_parameters() if p.grad is not None}
    assert trained == {"decoder", "post_quant", "quantizer"}


def test_gradient_reaches_the_encoder_through_the_quantizer():
    tokenizer = tiny().train()
    tokenizer(images())[0].square().mean().backward()
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0


def test_half_precision_decodes_in_the_decoders_dtype():
    tokenizer = tiny(5).to(torch.bfloat16)
    x = images().to(torch.bfloat16)
    assert tokenizer.decode(tokenizer.encode(x)).dtype == torch.bfloat16


def test_tokenizer_refuses_in_one_sentence():
    tokenizer = tiny()
    with pytest.raises(ValueError, match=r"images are 15x16, .* multiples of the downsampling 2"):
        tokenizer.encode(images(1, 15, 16))
    with pytest.raises(ValueError, match=r"images are torch.uint8"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"takes \(B, 3, H, W\)"):
        tokenizer.encode(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"decodes grids \(B, h, w\)"):
        tokenizer.decode(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="channel_axis=-1"):
        Tokenizer.build(TINY, build_quantizer("vq", num_codes=4, dim=12))


def test_saved_folder_gives_the_same_bits(tmp_path):
    tokenizer = tiny(5, seed=3)
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    loaded = Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert not loaded.training
    expected, found = tokenizer.state_dict(), loaded.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    x = images()
    assert torch.equal(loaded.encode(x), tokenizer.encode(x))
    assert torch.equal(loaded(x)[0], tokenizer(x)[0])
    assert loaded.quantizer.spec == tokenizer.quantizer.spec
    assert loaded.config == TINY
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"model.safetensors", "config.json"}


def test_saving_again_replaces_and_tied_parameters_are_saved(tmp_path):
    tokenizer = tiny()
    tokenizer.save_pretrained(tmp_path)
    tokenizer.decoder.mid[0].conv1.weight = tokenizer.encoder.mid[0].conv1.weight
    with torch.no_grad():
        tokenizer.encoder.mid[0].conv1.weight.add_(1)
    loaded = Tokenizer.from_pretrained(tokenizer.save_pretrained(tmp_path))
    assert torch.equal(loaded.decoder.mid[0].conv1.weight, tokenizer.encoder.mid[0].conv1.weight)
    assert torch.equal(loaded.encoder.mid[0].conv1.weight, tokenizer.encoder.mid[0].conv1.weight)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_reading_refuses_what_is_missing_or_broken(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        Tokenizer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        Tokenizer.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    edit_config(tmp_path, format=99)
    with pytest.raises(ValueError, match="format 99"):
        Tokenizer.from_pretrained(tmp_path)
    edit_config(tmp_path, format=1, autoencoder={"channels": 8, "width": 3})
    with pytest.raises(ValueError, match="'multipliers' is not right"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        Tokenizer.from_pretrained(tmp_path)


def test_reading_lists_what_does_not_fit(tmp_path):
    tiny().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["decoder.extra"] = state.pop("encoder.conv_in.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.extra is not expected; encoder\.conv_in\.weight is missing\.$"):
        Tokenizer.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is \(16, 12\) instead of \(32, 12\)"):
        Tokenizer.from_pretrained(tmp_path, build_quantizer("vq", num_codes=32, dim=12, channel_axis=1))


def test_a_quantizer_from_a_users_file_is_asked_for_and_never_run(tmp_path):
    trap = tmp_path / "mine.py"
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef vq(*a, **k): raise RuntimeError\n")
    tokenizer = tiny()
    tokenizer.quantizer.spec = dict(tokenizer.quantizer.spec, name=f"{trap}:vq")
    tokenizer.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"pass quantizer=\.\.\."):
        Tokenizer.from_pretrained(tmp_path / "saved")
    assert not (tmp_path / "ran").exists()
    given = build_quantizer("vq", num_codes=16, dim=12, channel_axis=1, seed=9)
    loaded = Tokenizer.from_pretrained(tmp_path / "saved", quantizer=given)
    assert torch.equal(loaded.encode(images()), tokenizer.encode(images()))


def test_hand_made_parts_say_what_they_need(tmp_path):
    quantizer = build_quantizer("vq", num_codes=16, dim=12, channel_axis=1)
    by_hand = Tokenizer(Encoder(8, (1, 2), 1, 1, 12), Decoder(8, (1, 2), 1, 1, 12), quantizer)
    assert by_hand.decode(by_hand.encode(images())).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"Tokenizer\.build"):
        by_hand.save_pretrained(tmp_path)
    built = tiny()
    built.quantizer.spec = None
    built.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pass quantizer=\.\.\."):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("drop", ["layout", "projection"])
def test_folders_of_before_a_setting_was_added_are_read(tmp_path, drop):
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["autoencoder"][drop]
    edit_config(tmp_path, **config)
    assert torch.equal(Tokenizer.from_pretrained(tmp_path).encode(images()), tiny().encode(images()))


@pytest.mark.parametrize(
    "config",
    [
        AutoencoderConfig(8, (1, 2), 1, z_channels=6, layout="vqgan", attention=(0, 1), mid_attention=True),
        AutoencoderConfig(
            8, (2, 1, 1), 1, z_channels=12, layout="vqgan", decoder_res_blocks=1, groups=4, projection=True
        ),
        AutoencoderConfig(8, (1, 2), 1, 1, z_channels=12, adaptive=True, groups=2),
    ],
)
def test_every_layout_trains_each_parameter_and_is_saved(config, tmp_path):
    tokenizer = Tokenizer.build(config, build_quantizer("vq", num_codes=16, dim=12, channel_axis=1, init="unit_normal"))
    out, quantized = tokenizer(images())
    assert out.shape == images().shape
    ((out - images()).square().mean() + quantized.loss).backward()
    # A shift of the keys is the same for all positions and so without a gradient, but for rounding.
    silent = [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.endswith(".k.bias") for name in silent)
    tokenizer.eval().save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.config == config
    assert torch.equal(again.encode(images()), tokenizer.encode(images()))
    assert torch.equal(again.decode(again.encode(images())), tokenizer.decode(tokenizer.encode(images())))


def test_attention_is_that_of_its_equation():
    """x_i + W_o sum_j softmax_j(q_i . k_j / sqrt(C)) v_j + b_o, position by position."""
    from steadyvq.models.blocks import Attention

    torch.manual_seed(0)
    block = Attention(8, groups=2).double()
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    normed = torch.nn.functional.group_norm(x, 2, block.norm.weight, block.norm.bias, 1e-6).flatten(2)
    parts = {n: getattr(block, n) for n in ("q", "k", "v")}
    q, k, v = (p.weight[..., 0, 0] @ normed + p.bias[:, None] for p in parts.values())
    expected = x.flatten(2).clone()
    for b in range(2):
        for i in range(6):
            scores = torch.stack([(q[b, :, i] * k[b, :, j]).sum() / 8**0.5 for j in range(6)])
            share = scores.exp() / scores.exp().sum()
            mixed = sum(share[j] * v[b, :, j] for j in range(6))
            expected[b, :, i] += block.proj.weight[..., 0, 0] @ mixed + block.proj.bias
    torch.testing.assert_close(block(x), expected.reshape(x.shape))


def test_latents_of_one_position_have_no_spread():
    from steadyvq.models.blocks import AdaptiveNorm

    out = AdaptiveNorm(4, 8)(torch.randn(2, 8, 2, 2), torch.randn(2, 4, 1, 1))
    assert out.isfinite().all()
