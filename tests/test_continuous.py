# SPDX-License-Identifier: Apache-2.0
"""KL autoencoders of others: every key mapped, the same latents and pixels as their own arithmetic, quantised afterwards."""

from pathlib import Path

import pytest
import torch
from foreign import Raw, State, continuous, random_state, save_kl, save_taming
from safetensors.torch import save_file
from test_transplant import DECODER, ENCODER, differ
from torch import Tensor

from steadyvq import Tokenizer
from steadyvq.cli import main
from steadyvq.data import load_image
from steadyvq.interop import CONTINUOUS, import_autoencoder, import_checkpoint, import_tokenizer
from steadyvq.models import Autoencoder
from steadyvq.training.run import RunFolder
from steadyvq.training.transplant import read_source
from steadyvq.training.weights import averaged_weights

# case -> (format, its keys, dialect of the names)
CASES = {
    "latent diffusion": ("kl", continuous(32, (1, 2), 2, 4), "taming"),
    "flux": ("kl", continuous(32, (1, 2), 2, 8, mixed=False), "taming"),
    "stable diffusion in diffusers": ("diffusers_kl", continuous(32, (1, 2), 2, 4, "diffusers"), "diffusers"),
    "stable diffusion 3 in diffusers": (
        "diffusers_kl",
        continuous(32, (1, 2), 2, 8, "diffusers", mixed=False),
        "diffusers",
    ),
}


@pytest.fixture(scope="module")
def images(photos) -> Tensor:
    """Two real photographs (2, 3, 32, 32) in [-1, 1]."""
    return torch.stack([load_image(file, 32) for file in sorted(photos.glob("*.*"))[:2]]).float() / 127.5 - 1


def weights(case: str) -> State:
    return random_state(CASES[case][1], seed=len(case))


def assert_equal_to(autoencoder: Autoencoder, z: Tensor, pixels: Tensor, images: Tensor) -> None:
    """In float64; weights that were put together have the digits of float32."""
    with torch.no_grad():
        own = autoencoder.double()
        torch.testing.assert_close(own.latents(images.double()), z, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own.decode(z), pixels, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_latents_and_pixels_are_those_of_the_raw_names(case, images, tmp_path):
    name, shapes, dialect = CASES[case]
    state = weights(case)
    torch.save({"state_dict": state}, tmp_path / "theirs.ckpt")
    imported = import_autoencoder(tmp_path / "theirs.ckpt")
    assert (imported.format, imported.mapped) == (name, len(shapes))
    raw = Raw(state, dialect)
    z = raw.mean(images)
    assert z.shape[1] == imported.autoencoder.config.z_channels
    assert z.std() > 0.1
    assert_equal_to(imported.autoencoder, z, raw.images(z), images)


def test_every_format_has_a_case():
    assert {case[0] for case in CASES.values()} == set(CONTINUOUS)


@pytest.mark.parametrize("mixed", [True, False])
def test_diffusers_itself_gives_the_same(mixed, images, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=mixed,
        use_post_quant_conv=mixed,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    imported = import_autoencoder(tmp_path / "theirs")
    assert imported.autoencoder.config.groups == 4
    assert imported.mapped == len(theirs.state_dict())
    with torch.no_grad():
        z = theirs.double().encode(images.double()).latent_dist.mean
        assert_equal_to(imported.autoencoder, z, theirs.decode(z).sample, images)


def test_the_file_of_a_whole_latent_diffusion_model(images, tmp_path):
    state = weights("latent diffusion")
    whole = {f"first_stage_model.{name}": value.half() for name, value in state.items()}
    save_file(
        {**whole, "model.diffusion_model.out.weight": torch.zeros(2), "betas": torch.zeros(9)},
        tmp_path / "a.safetensors",
    )
    imported = import_autoencoder(tmp_path / "a.safetensors")
    assert imported.ignored == {"model.": 1, "betas": 1}
    z = Raw({name: value.half() for name, value in state.items()}, "taming").mean(images)
    with torch.no_grad():
        torch.testing.assert_close(imported.autoencoder.double().latents(images.double()), z, rtol=1e-6, atol=1e-6)


def changed(drop: str = "", **added: Tensor) -> State:
    state = {name: value for name, value in weights("latent diffusion").items() if name != drop}
    return {**state, **{name.replace("__", "."): value for name, value in added.items()}}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed("decoder.mid.attn_1.k.bias"), r"decoder\.mid\.attn_1\.k\.bias is missing"),
        (changed(more=torch.zeros(3)), "more is left over"),
        (changed("quant_conv.bias"), r"quant_conv\.bias is missing"),
        (changed("post_quant_conv.bias"), r"post_quant_conv\.bias is missing"),
        (
            changed(quant_conv__weight=torch.zeros(8, 6, 1, 1)),
            r"quant_conv.weight is \(8, 6, 1, 1\), which does not fit 8",
        ),
        (
            changed(quant_conv__weight=torch.zeros(6, 8, 1, 1), quant_conv__bias=torch.zeros(6)),
            "gives 6 moments and its decoder takes 4",
        ),
    ],
)
def test_what_does_not_fit_is_named(state, message, tmp_path):
    torch.save(state, tmp_path / "theirs.ckpt")
    with pytest.raises(ValueError, match=message):
        import_autoencoder(tmp_path / "theirs.ckpt")


def test_tokenizers_and_autoencoders_are_told_apart(tmp_path):
    save_kl(tmp_path / "kl.ckpt")
    save_taming(tmp_path / "vq.ckpt")
    with pytest.raises(
        ValueError, match=r"kl .*has no quantizer and so is no tokenizer.*import_autoencoder.*transplant"
    ):
        import_tokenizer(tmp_path / "kl.ckpt")
    with pytest.raises(ValueError, match=r"is a tokenizer .* and no continuous autoencoder"):
        import_autoencoder(tmp_path / "vq.ckpt")
    assert import_checkpoint(tmp_path / "vq.ckpt").format == "taming"
    with pytest.raises(ValueError, match="no autoencoder of the format diffusers_kl"):
        import_autoencoder(tmp_path / "kl.ckpt", "diffusers_kl")
    with pytest.raises(ValueError, match=r"unknown format 'k1': known are .*diffusers_kl.*did you mean 'kl'"):
        import_checkpoint(tmp_path / "kl.ckpt", "k1")
    torch.save({"a.b": torch.zeros(3)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"unknown .*taming.*kl \(latent diffusion and FLUX.*diffusers_kl"):
        import_checkpoint(tmp_path / "other.ckpt")


SETS = [
    "epochs=2",
    "batch_size=6",
    "quantizer.init_samples=12",
    "data.crop_size=16",
    "data.epoch_samples=12",
    "data.eval_crops=8",
]


def command(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kl")
    save_kl(folder / "kl.ckpt")
    assert command("import", folder / "kl.ckpt", folder / "body") == 0
    return folder / "body"


@pytest.mark.parametrize("train", ["all", "decoder", "codebook"])
def test_post_hoc_quantisation(body, photos, tmp_path, train, capsys):
    """The limit case of NSVQ's freeze: an encoder that no quantizer ever moved (CODA, TokenBridge)."""
    assert read_source(body).dim == 4
    sets = [word for pair in SETS for word in ("--set", pair)]
    out = tmp_path / "run"
    assert command("transplant", body, "--codes", 32, "--data", photos, "--train", train, "--out", out, *sets) == 0
    before, after = averaged_weights(body), averaged_weights(out)
    assert differ(before, after, ENCODER) == []
    assert bool(differ(before, after, DECODER)) == (train != "codebook")
    assert [s.name for s in RunFolder.open(out).config.stages] == {
        "all": ["transplant", "refine"],
        "decoder": ["refine"],
        "codebook": ["transplant"],
    }[train]
    tokenizer = Tokenizer.from_pretrained(out / "tokenizer")
    picture = load_image(min(photos.glob("*.*")), 32)[None].float() / 127.5 - 1
    tokens = tokenizer.encode(picture)
    assert len(tokens.unique()) > 3
    z = import_autoencoder(body.parent / "kl.ckpt").autoencoder.latents(picture)
    assert torch.equal(tokens, tokenizer.quantizer.encode(z)), "tokens are those of the imported latents"


def test_the_command_tells_what_it_did(body, capsys, tmp_path):
    assert command("import", body.parent / "kl.ckpt", tmp_path / "again") == 0
    told = capsys.readouterr().err
    assert "format: kl (latent diffusion and FLUX: KL autoencoder)" in told
    assert "none left over" in told
    assert "latents (the means) of 4 features; what makes the variance is left out" in told
    assert "ignored, not needed: loss.* (2)" in told
    assert f"to quantise it: steadyvq transplant {tmp_path / 'again'} --data DIR" in told
    assert command("encode", tmp_path / "again", "--data", "mvtb", "--out", tmp_path / "t.npz") == 2
