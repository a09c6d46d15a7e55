# SPDX-License-Identifier: Apache-2.0
"""Other people's checkpoints: every key mapped, the same tokens and pixels as their own arithmetic, and ours back as theirs."""

import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from foreign import Raw, State, bridge, layer, magvit, random_state, save_taming, taming
from safetensors.torch import save_file
from torch import Tensor

from steadyvq import Tokenizer, build_quantizer
from steadyvq.data import decode_image
from steadyvq.data.decode import centre_square
from steadyvq.interop import FORMATS, export_tokenizer, import_tokenizer
from steadyvq.interop.reading import INERT_GLOBALS
from steadyvq.models import AutoencoderConfig, autoencoder_config

SIMVQ = magvit(32, (1, 2), 2, 8) | {"quantize.embedding.weight": (64, 8)} | layer("quantize.embedding_proj", 8, 8)
BRIDGED = taming(32, (1, 2), 2, (1,), 8, 4, 64, "llamagen") | bridge(4, 4, 8, 2)
WIDE = taming(32, (1, 2), 2, (1,), 40, 40, 64, "llamagen")
# case -> (format, its keys, what is searched, the dialect of the names, whether the names alone tell the format)
CASES = {
    "taming": ("taming", taming(32, (1, 2), 2, (1,), 8, 4, 64), "l2", "taming", True),
    "latent diffusion f4": ("taming", taming(32, (1, 2, 1), 2, (), 3, 3, 64), "l2", "taming", True),
    "llamagen": ("llamagen", taming(32, (1, 2), 2, (1,), 8, 4, 64, "llamagen"), "sphere", "llamagen", True),
    "simvq": ("simvq", SIMVQ, "simvq", "magvit", True),
    "ibq": ("ibq", taming(32, (1, 2), 4, (1,), 8, 4, 64), "dot", "taming", False),
    "lfq": ("lfq", magvit(32, (1, 2), 2, 6), "bits", "magvit", True),
    "lfq adaptive": ("lfq", magvit(32, (1, 1, 2), 1, 6, adaptive=True), "bits", "magvit", True),
    "fvq": ("fvq", BRIDGED, "bridge", "llamagen", True),
    "fvq baked": ("fvq", WIDE, "l2", "llamagen", False),
    "diffusers": ("diffusers", taming(32, (1, 2), 2, (), 8, 4, 64, "diffusers"), "l2", "diffusers", True),
    "diffusers attention": ("diffusers", taming(32, (1, 2), 1, (1,), 8, 4, 64, "diffusers"), "l2", "diffusers", True),
}


def weights(case: str) -> State:
    return random_state(CASES[case][1], seed=len(case))


@pytest.fixture(scope="module")
def images(photos) -> Tensor:
    """Two real photographs (2, 3, 32, 32) in [-1, 1]."""
    files = sorted(photos.glob("*.*"))[:2]
    squares = [centre_square(decode_image(file), 32) for file in files]
    return torch.stack([torch.as_tensor(square) for square in squares]).float() / 127.5 - 1


def run(tokenizer: Tokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and images, not clamped, in float64."""
    with torch.no_grad():
        out, quantized = tokenizer.double()(images.double())
    return quantized.indices, out


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_pixels_are_those_of_the_raw_names(case, images, tmp_path):
    name, shapes, method, dialect, told = CASES[case]
    state = weights(case)
    torch.save({"state_dict": state}, tmp_path / "theirs.ckpt")
    imported = import_tokenizer(tmp_path / "theirs.ckpt", format="auto" if told else name)
    assert imported.format == name
    assert imported.mapped == len(shapes)
    tokens, pixels = Raw(state, dialect).run(images, method)
    assert len(tokens.unique()) > 5
    imported.tokenizer.save_pretrained(tmp_path / "ours")
    for tokenizer in (imported.tokenizer, Tokenizer.from_pretrained(tmp_path / "ours")):
        ours, out = run(tokenizer, images)
        assert torch.equal(ours, tokens)
        torch.testing.assert_close(out, pixels, rtol=1e-7, atol=1e-7)


def test_every_format_has_a_case():
    assert {case[0] for case in CASES.values()} == set(FORMATS)


@pytest.mark.parametrize("case", ["ibq", "fvq baked"])
def test_names_that_fit_two_formats_are_asked_about(case, tmp_path):
    torch.save(weights(case), tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match=f"differ in the search.*--format {CASES[case][0]}"):
        import_tokenizer(tmp_path / "theirs.pt")


def test_the_named_size_has_the_published_number_of_parameters():
    """LlamaGen and taming f16: 72 M parameters with codebook and projections apart (methods of both papers)."""
    with torch.device("meta"):
        parts = autoencoder_config("vqgan_f16").build()
    shapes = taming(128, (1, 1, 2, 2, 4), 2, (4,), 256, 256, 16384)
    own = [shape for name, shape in shapes.items() if name.startswith(("encoder.", "decoder."))]
    count = sum(torch.Size(shape).numel() for shape in own)
    assert sum(p.numel() for part in parts for p in part.parameters()) == count
    assert count / 1e6 == pytest.approx(72, abs=1)


def test_losses_are_ignored_by_name_and_averages_are_taken_where_there_are_any(tmp_path):
    state = save_taming(tmp_path / "plain.ckpt")
    plain = import_tokenizer(tmp_path / "plain.ckpt")
    assert plain.ignored == {"loss.": 2}
    averages = {f"model_ema.{name.replace('.', '')}": value + 1 for name, value in state.items()}
    more = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1)}
    torch.save({"state_dict": {**state, **averages, **more}}, tmp_path / "averaged.ckpt")
    kernel = "encoder.conv_in.weight"
    for choice, expected in (("auto", state[kernel] + 1), ("ema", state[kernel] + 1), ("model", state[kernel])):
        imported = import_tokenizer(tmp_path / "averaged.ckpt", weights=choice)
        assert torch.equal(imported.tokenizer.state_dict()[kernel], expected)
        assert imported.ignored == {"model_ema.": len(averages) + 2}
    with pytest.raises(ValueError, match="no averaged weights"):
        import_tokenizer(tmp_path / "plain.ckpt", weights="ema")
    with pytest.raises(ValueError, match="'auto', 'ema' or 'model'"):
        import_tokenizer(tmp_path / "plain.ckpt", weights="average")


def test_containers_of_llamagen_and_prefixes_of_wrappers(tmp_path):
    state = weights("llamagen")
    state["quantize.codebook_used"] = torch.zeros(65536)
    doubled = {name: 2 * value for name, value in state.items()}
    torch.save({"model": state, "ema": doubled, "optimizer": {"state": {}}, "steps": 5}, tmp_path / "both.pt")
    kernel = "encoder.conv_in.weight"
    assert torch.equal(import_tokenizer(tmp_path / "both.pt").tokenizer.state_dict()[kernel], 2 * state[kernel])
    last = import_tokenizer(tmp_path / "both.pt", weights="model")
    assert torch.equal(last.tokenizer.state_dict()[kernel], state[kernel])
    assert last.ignored == {"quantize.codebook_used": 1}
    whole = {f"first_stage_model.{name}": value.half() for name, value in weights("latent diffusion f4").items()}
    whole |= {"model.diffusion_model.out.weight": torch.zeros(2), "betas": torch.zeros(9)}
    save_file(whole, tmp_path / "ldm.safetensors")
    inside = import_tokenizer(tmp_path / "ldm.safetensors")
    assert inside.format == "taming"
    assert inside.ignored == {"model.": 1, "betas": 1}
    assert next(inside.tokenizer.parameters()).dtype == torch.float32


def module_named(name: str, **members: object) -> dict[str, types.ModuleType]:
    """Modules as they exist where a checkpoint was written, so that it can be pickled here."""
    found = {}
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        found[".".join(parts[:i])] = types.ModuleType(".".join(parts[:i]))
    for key, value in members.items():
        setattr(found[name], key, value)
    return found


def made_in(module: str, name: str, base: type = object) -> type:
    return type(name, (base,), {"__module__": module, "__qualname__": name})


def test_settings_of_lightning_are_left_out_and_nothing_of_theirs_is_imported(tmp_path, monkeypatch):
    config = made_in("omegaconf.dictconfig", "DictConfig")
    callback = made_in("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    with monkeypatch.context() as there:
        there_modules = module_named("omegaconf.dictconfig", DictConfig=config)
        there_modules |= module_named("pytorch_lightning.callbacks.model_checkpoint", ModelCheckpoint=callback)
        for name, module in there_modules.items():
            there.setitem(sys.modules, name, module)
        settings = config()
        settings.content = {"lr": 4.5e-6, "path": Path("/data")}
        more = {"hyper_parameters": settings, "callbacks": {callback: {"best": 1.0}}}
        state = save_taming(tmp_path / "lightning.ckpt", **more)
    imported = import_tokenizer(tmp_path / "lightning.ckpt")
    assert torch.equal(imported.tokenizer.state_dict()["encoder.conv_in.weight"], state["encoder.conv_in.weight"])
    assert not any(name.startswith(("omegaconf", "pytorch_lightning")) for name in sys.modules)
    assert {"omegaconf.dictconfig.DictConfig", "argparse.Namespace"} <= set(INERT_GLOBALS)


def test_real_omegaconf_and_numpy(tmp_path):
    import argparse
    import collections

    import numpy as np

    omegaconf = pytest.importorskip("omegaconf")
    settings = omegaconf.OmegaConf.create({"a": 1, "b": [1.5, {"c": None}], "d": "x", "e": True})
    more = {
        "hyper_parameters": settings,
        "args": argparse.Namespace(lr=1e-4, folder=Path("/x")),
        "loss": np.float64(3.0),
        "curve": np.arange(3),
        "counts": collections.defaultdict(int, {1: 2}),
    }
    save_taming(tmp_path / "lightning.ckpt", **more)
    assert import_tokenizer(tmp_path / "lightning.ckpt").format == "taming"


class Trap:
    """Runs a command when it is unpickled as pickles are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_names_anything_else_is_refused_and_not_run(tmp_path, legacy):
    state = {"state_dict": weights("taming"), "trap": Trap(tmp_path / "ran")}
    torch.save(state, tmp_path / "trap.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"names the Python object \S*system.*nothing that a file names is run"):
        import_tokenizer(tmp_path / "trap.ckpt")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"bare\.ckpt"):
        import_tokenizer(tmp_path / "bare.ckpt")
    assert not (tmp_path / "ran").exists()


def change(case: str, drop: str = "", **added: Tensor) -> State:
    state = {name: value for name, value in weights(case).items() if name != drop}
    return {**state, **{name.replace("__", "."): value for name, value in added.items()}}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (change("taming", "decoder.mid.attn_1.k.bias"), r"decoder\.mid\.attn_1\.k\.bias is missing"),
        (change("taming", quantize__used=torch.zeros(3)), r"quantize\.used is left over"),
        (
            change("taming", decoder__conv_out__bias=torch.zeros(1)),
            r"decoder\.conv_out\.bias is \(1,\).*not fit \(3,\)",
        ),
        (change("taming", "quantize.embedding.weight"), r"quantize\.embedding\.weight is missing"),
        (change("taming", "encoder.conv_in.weight"), r"encoder\.conv_in\.weight is missing"),
        (change("taming", encoder__conv_in__weight=torch.zeros(20, 3, 3, 3)), "multiples of the first one, 20"),
        (change("taming", encoder__conv_in__weight=torch.zeros(32, 1, 3, 3)), r"\(32, 1, 3, 3\), which does not fit"),
        (change("taming", quantize__proj__weight=torch.zeros(3)), "Gumbel"),
        (change("fvq", quantize__qbridge__blocks__0__adaLN=torch.zeros(3)), "convert_fullvq2vq"),
        (change("diffusers", decoder__mid_block__resnets__0__norm1__norm_layer__weight=torch.zeros(3)), "MoVQ"),
        ({"quantizer.quantizers.0.in_proj.bias": torch.zeros(3)}, "from_dac"),
        (
            {"a.b": torch.zeros(3), "c": torch.zeros(1)},
            r"unknown \(its names begin with a, c\).*taming.*llamagen.*diffusers",
        ),
        ({}, "no tensors"),
        ([torch.zeros(3)], "holds a list"),
    ],
)
def test_what_does_not_fit_is_named(state, message, tmp_path):
    torch.save(state, tmp_path / "theirs.ckpt")
    with pytest.raises(ValueError, match=message):
        import_tokenizer(tmp_path / "theirs.ckpt")


def test_other_refusals(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        import_tokenizer(tmp_path / "nothing.ckpt")
    with pytest.raises(ValueError, match="is a folder without"):
        import_tokenizer(tmp_path)
    (tmp_path / "words.ckpt").write_text("no pickle at all")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint") as refused:
        import_tokenizer(tmp_path / "words.ckpt")
    assert "weights_only" not in str(refused.value), "torch's advice to load without the check"
    save_taming(tmp_path / "theirs.ckpt")
    with pytest.raises(ValueError, match="did you mean 'taming'"):
        import_tokenizer(tmp_path / "theirs.ckpt", format="tamming")
    with pytest.raises(ValueError, match="no tokenizer of the format llamagen"):
        import_tokenizer(tmp_path / "theirs.ckpt", format="llamagen")
    with pytest.raises(ValueError, match="groups is 7"):
        import_tokenizer(tmp_path / "theirs.ckpt", groups=7)


VQGAN = AutoencoderConfig(
    32, (1, 2), z_channels=8, layout="vqgan", attention=(1,), mid_attention=True, groups=32, projection=True
)


def ours(name: str = "vq", config: AutoencoderConfig = VQGAN, dim: int = 4, **options: object) -> Tokenizer:
    torch.manual_seed(3)
    quantizer = build_quantizer(name, num_codes=64, dim=dim, channel_axis=1, init="unit_normal", **options)
    return Tokenizer.build(config, quantizer).eval()


@pytest.mark.parametrize(
    ("format", "method", "search"),
    [
        ("taming", "nsvq", "l2"),
        ("taming", "simvq", "l2"),
        ("llamagen", "vqgan_fc", "sphere"),
        ("llamagen", "vq", "l2"),
        ("diffusers", "ema", "l2"),
    ],
)
def test_exports_give_the_same_tokens_and_pixels_there(format, method, search, images, tmp_path):
    tokenizer = ours(method)
    path = tmp_path / ("folder" if format == "diffusers" else "file.ckpt")
    note = export_tokenizer(tokenizer, path, format)
    assert "load it" in note
    again = import_tokenizer(path, format={"l2": "fvq"}.get(search, "auto") if format == "llamagen" else "auto")
    state = theirs_of(path)
    tokens, pixels = Raw(state, format).run(images, search)
    assert len(tokens.unique()) > 5
    assert set(state) == set(taming(32, (1, 2), 2, (1,), 8, 4, 64, format))
    for mine in (tokenizer, again.tokenizer):
        found, out = run(mine, images)
        assert torch.equal(found, tokens)
        torch.testing.assert_close(out, pixels, rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.rglob("*.tmp*"))


def theirs_of(path: Path) -> State:
    if path.is_dir():
        from safetensors.torch import load_file

        return load_file(path / "diffusion_pytorch_model.safetensors")
    return next(iter(torch.load(path, weights_only=True).values()))


def test_a_tokenizer_without_projections_gets_ones_that_change_nothing(images, tmp_path):
    config = AutoencoderConfig(32, (1, 2), z_channels=4, layout="vqgan", mid_attention=True, groups=32)
    tokenizer = ours(config=config)
    export_tokenizer(tokenizer, tmp_path / "file.ckpt", "taming")
    tokens, pixels = Raw(theirs_of(tmp_path / "file.ckpt"), "taming").run(images, "l2")
    found, out = run(tokenizer, images)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(out, pixels, rtol=1e-7, atol=1e-7)


PLAIN = AutoencoderConfig(8, (1, 2), 1, 1, 4)


@pytest.mark.parametrize(
    ("format", "make", "message"),
    [
        ("tamming", ours, "did you mean 'taming'"),
        ("taming", lambda: ours(config=PLAIN), "model.layout=vqgan"),
        ("taming", lambda: ours("ibq"), "not nearest codes"),
        ("taming", lambda: ours("vqgan_fc"), "write it as llamagen"),
        ("taming", lambda: ours(config=AutoencoderConfig(32, (1,), layout="vqgan", groups=32)), "mid_attention=true"),
        ("taming", lambda: ours(config=AutoencoderConfig(8, (1,), layout="vqgan", mid_attention=True)), "groups=32"),
        ("diffusers", lambda: ours(config=AutoencoderConfig(8, (1, 4), layout="vqgan")), "one number for all"),
        ("diffusers", lambda: ours(config=AutoencoderConfig(8, (2, 2), layout="vqgan", groups=4)), "of one width"),
        (
            "diffusers",
            lambda: ours(config=AutoencoderConfig(8, (1, 1), layout="vqgan", groups=4, decoder_res_blocks=2)),
            "one more than in the encoder, 3",
        ),
        (
            "llamagen",
            lambda: ours(config=AutoencoderConfig(32, (1, 2), layout="vqgan", mid_attention=True, groups=32)),
            r"attention=\[1\]",
        ),
        (
            "taming",
            lambda: Tokenizer.build(VQGAN, build_quantizer("lfq", num_codes=16, dim=4, channel_axis=1)),
            "one table of codes",
        ),
    ],
)
def test_what_another_project_cannot_run_is_not_written(format, make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_tokenizer(make(), tmp_path / "file", format)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("attends", [(), (1,)])
def test_diffusers_itself_gives_the_same_and_reads_what_is_written(attends, images, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    blocks = [("Attn" if level in attends else "") for level in range(2)]
    theirs = diffusers.VQModel(
        block_out_channels=(16, 32),
        down_block_types=[f"{kind}DownEncoderBlock2D" for kind in blocks],
        up_block_types=[f"{kind}UpDecoderBlock2D" for kind in blocks[::-1]],
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=64,
        norm_num_groups=4,
        vq_embed_dim=4,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.quantize.embedding.weight.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    imported = import_tokenizer(tmp_path / "theirs")
    assert imported.tokenizer.config.groups == 4
    export_tokenizer(imported.tokenizer, tmp_path / "back", "diffusers")
    back = diffusers.VQModel.from_pretrained(tmp_path / "back").eval()
    tokens, pixels = run(imported.tokenizer, images)
    for model in (theirs.double(), back.double()):
        with torch.no_grad():
            z = model.encode(images.double()).latents
            _, _, (_, _, indices) = model.quantize(z)
            torch.testing.assert_close(pixels, model.decode(z).sample, rtol=1e-6, atol=1e-6)
        assert torch.equal(indices.reshape(tokens.shape), tokens)
    assert len(tokens.unique()) > 5


def test_a_published_size_of_diffusers_with_old_names_of_attention(tmp_path):
    """Before version 0.15 the layers of attention were called query, key, value and proj_attn."""
    state = weights("diffusers attention")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in state.items():
        for new, before in names.items():
            name = name.replace(f".{new}.", f".{before}.") if ".attentions." in name else name
        old[name] = value
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"norm_num_groups": 16}')
    imported = import_tokenizer(tmp_path)
    assert imported.tokenizer.config.groups == 16
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        import_tokenizer(tmp_path)


def test_diffusers_is_told_which_levels_attend(tmp_path):
    """Highest resolution first in the encoder, lowest first in the decoder."""
    import json

    export_tokenizer(ours(), tmp_path, "diffusers")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["down_block_types"] == ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    assert config["up_block_types"] == ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]
    assert (config["block_out_channels"], config["layers_per_block"]) == ([32, 64], 2)
