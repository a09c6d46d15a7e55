# SPDX-License-Identifier: Apache-2.0
"""`steadyvq import` and `export`: other people's tokenizers as ours, and ours as theirs."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from steadyvq.cli.common import check_output, open_tokenizer, say
from steadyvq.files import write_text
from steadyvq.interop import Imported, ImportedAutoencoder, export_tokenizer, import_checkpoint
from steadyvq.models import Autoencoder, AutoencoderConfig

RECIPE = "recipe.yaml"


def import_file(arguments: argparse.Namespace) -> int:
    """Turns a checkpoint into a saved tokenizer and a recipe that trains on from it, or into a saved autoencoder."""
    check_output(arguments.out, folder=True)
    given = {"format": arguments.format, "weights": arguments.weights, "groups": arguments.groups}
    imported = import_checkpoint(arguments.file, **given)
    if isinstance(imported, ImportedAutoencoder):
        return _save_autoencoder(imported, arguments.out)
    imported.tokenizer.save_pretrained(arguments.out)
    write_text(arguments.out / RECIPE, yaml.safe_dump(_recipe(imported), sort_keys=False))
    for line in _account(imported):
        say(line)
    say(f"tokenizer: {arguments.out}")
    say(f"to train on: steadyvq train {arguments.out / RECIPE} --init-from {arguments.out} --data DIR")
    return 0


def _save_autoencoder(imported: ImportedAutoencoder, out: Path) -> int:
    imported.autoencoder.save_pretrained(out)
    for line in _account(imported):
        say(line)
    say(f"autoencoder without a quantizer: {out}")
    say(f"to quantise it: steadyvq transplant {out} --data DIR")
    return 0


def _recipe(imported: Imported) -> dict[str, Any]:
    """The settings of a run whose model the tokenizer fits."""
    config, defaults = imported.tokenizer.config, asdict(AutoencoderConfig())
    assert config is not None
    size = {name: value for name, value in asdict(config).items() if value != defaults[name]}
    spec = dict(imported.tokenizer.quantizer.spec or {})
    options = {name: value for name, value in spec.items() if name not in ("name", "num_codes", "dim", "channel_axis")}
    quantizer = {"name": spec["name"], "num_codes": spec["num_codes"], "dim": spec["dim"], "options": options}
    return {
        "title": f"from {imported.what}",
        "data": {"crop_size": 16 * config.downsampling},
        "model": {name: list(value) if isinstance(value, tuple) else value for name, value in size.items()},
        "quantizer": quantizer,
    }


def _account(imported: Imported | ImportedAutoencoder) -> list[str]:
    """What was taken over and what was not."""
    model = imported.autoencoder if isinstance(imported, ImportedAutoencoder) else imported.tokenizer
    if isinstance(model, Autoencoder):
        latents = f"latents (the means) of {model.config.z_channels} features; what makes the variance is left out"
        factor = model.config.downsampling
    else:
        latents = f"{model.quantizer.num_codes:,} codes of {model.quantizer.dim} features"
        factor = model.downsampling
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, f = {factor}"
    lines = [
        f"format: {imported.format} ({imported.what})",
        f"weights: {imported.weights}",
        f"mapped: {imported.mapped} tensors, none left over; {size}, {latents}",
    ]
    ignored = ", ".join(f"{name}* ({count})" for name, count in sorted(imported.ignored.items()))
    return [*lines, f"ignored, not needed: {ignored}"] if ignored else lines


def export_file(arguments: argparse.Namespace) -> int:
    """Writes a trained tokenizer as another project does."""
    out: Path = arguments.out
    check_output(out, folder=arguments.format == "diffusers")
    tokenizer, _ = open_tokenizer(arguments.run, arguments.quantizer)
    note = export_tokenizer(tokenizer, out, arguments.format)
    say(f"{arguments.format}: {out}")
    say(note)
    return 0
