# SPDX-License-Identifier: Apache-2.0
"""The published recipes and their tiny variants, as tables: everything is read from the recipe files themselves."""

import re
from importlib import resources

from steadyvq.experiments.markdown import markdown
from steadyvq.training.config import RunConfig, read_recipe, recipe_names, resolve
from steadyvq.training.run import differences

TINY = "_tiny"

LABELS = ("Hardware", "Published", "From the paper")
"""What the comment of a published recipe says, each at the beginning of a line."""

SIZE_KEYS = {
    "title": "",
    "data.source": "the built-in photographs",
    "data.streaming": "they are held in memory",
    "data.crop_size": "",
    "data.min_scale": "regions of photographs instead of whole shorter sides",
    "data.max_scale": "the same",
    "data.epoch_samples": "",
    "data.eval_crops": "",
    "model.channels": "",
    "model.multipliers": "",
    "model.num_res_blocks": "",
    "model.num_mid_blocks": "",
    "model.z_channels": "",
    "model.patch": "pixels folded into channels instead of levels",
    "model.attention": "the number of the lowest level",
    "quantizer.num_codes": "",
    "quantizer.dim": "",
    "quantizer.init": "VQGAN-LC: features for want of a file",
    "quantizer.options.features": "the same",
    "quantizer.options.patch": "FVQ's tokens",
    "quantizer.options.hidden": "FVQ's width",
    "optim.lr": "small models and short runs learn at higher rates",
    "optim.codebook_lr": "the same",
    "optim.warmup_steps": "",
    "optim.ema_decay": "a shorter average",
    "perceptual_net": "AlexNet in place of VGG16",
    "adversarial.options.channels": "",
    "adversarial.start": "",
    "adversarial.lr": "",
    "epochs": "",
    "batch_size": "",
    "precision": "float32",
    "log_every": "",
}
"""In what a tiny variant may differ from the published recipe, with a word on why where the name does not say it."""


def published() -> list[str]:
    """Names of the recipes that reproduce a paper's row."""
    return [name for name in recipe_names() if "\n# Published: " in text_of(name)]


def tiny() -> dict[str, str]:
    """Tiny variants by name, and the recipe that each is a small form of."""
    found = {}
    for name in recipe_names():
        base = re.search(r"^base: (\w+)$", text_of(name), re.MULTILINE)
        if name.endswith(TINY) and base:
            found[name] = base[1]
    return found


def text_of(name: str) -> str:
    """The file of a recipe."""
    return (resources.files("steadyvq") / "recipes" / f"{name}.yaml").read_text()


def config_of(name: str) -> RunConfig:
    """The resolved recipe."""
    return resolve(read_recipe(name))


def said(name: str, label: str) -> str:
    """What the comment of a recipe says after `label:`, up to its next line that has a label."""
    lines = [line.removeprefix("# ") for line in text_of(name).splitlines() if line.startswith("#")]
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{label}: "))
    end = next((i for i in range(start + 1, len(lines)) if re.match(r"[A-Z][\w ,]+: ", lines[i])), len(lines))
    return " ".join(lines[start:end]).removeprefix(f"{label}: ")


def recipe_table() -> str:
    """Every published recipe: images, tokens, codebook, length, the paper's numbers."""
    rows = []
    for name in published():
        config = config_of(name)
        side = config.data.crop_size // config.model.downsampling
        codes = f"{config.quantizer.num_codes:,} x {config.quantizer.dim}"
        size = f"{config.data.crop_size}, f{config.model.downsampling}, {side * side} tokens"
        length = f"{config.epochs} x {config.batch_size}"
        rows.append([f"`{name}`", size, codes, length, said(name, "Published").rstrip(".")])
    return markdown(["recipe", "images", "K x d", "epochs x batch", "published"], rows)


def size_table() -> str:
    """What each tiny variant changes."""
    rows = []
    for name, base in tiny().items():
        changed = differences(config_of(name).to_dict(), config_of(base).to_dict())
        rows.append([f"`{name}`", f"`{base}`", ", ".join(f"`{key}`" for key in changed if key != "title")])
    return markdown(["tiny", "of", "differs in"], rows)
