# SPDX-License-Identifier: Apache-2.0
"""The kinds of priors by the name of their task, and a trained prior as it lies in its folder.

A kind is a `TokenTask`: it trains a prior, builds it again from what was saved, and draws from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from steadyvq.data.shards import read_json
from steadyvq.files import read_tensors
from steadyvq.generation.tokens import TokenSet
from steadyvq.models.tokenizer import check_fit
from steadyvq.training.config import RunConfig

if TYPE_CHECKING:
    from steadyvq.generation.token_task import TokenTask

WEIGHTS, FACTS = "prior.safetensors", "prior.json"
KINDS = {
    "autoregressive": "steadyvq.generation.prior_task:PriorTask",
    "masked": "steadyvq.generation.masked_task:MaskedTask",
    "next_scale": "steadyvq.generation.next_scale_task:NextScaleTask",
    "diffusion": "steadyvq.generation.diffusion_task:DiffusionTask",
}
"""Module and class by the name of the task. They are imported when they are asked for."""


class PriorModel(nn.Module):
    """What all priors know of themselves.

    Attributes:
        num_classes: Classes; 0 for a prior that knows none.
        null: The class that stands for none; the only one where there are no classes.
    """

    num_classes: int
    null: int


@dataclass(frozen=True)
class Drawing:
    """How a prior is drawn from; every kind adds what it knows.

    Attributes:
        guidance: s of classifier-free guidance; 1 is the conditional model itself.
    """

    guidance: float = 1.0


@dataclass(frozen=True)
class TrainedPrior:
    """A prior with what it was trained on.

    Attributes:
        kind: The task that trained it.
        model: In evaluation mode.
        classes: Names of its classes.
        tokenizer_hash: Of the tokenizer whose tokens it knows.
        tokenizer_name: What that was called.
        tokens: The folder of the tokens.
    """

    kind: "type[TokenTask]"
    model: PriorModel
    classes: list[str]
    tokenizer_hash: str
    tokenizer_name: str
    tokens: Path


def kind_of(name: str) -> "type[TokenTask]":
    """The kind of prior that a task trains."""
    module, _, task = KINDS[name].partition(":")
    found: type[TokenTask] = getattr(import_module(module), task)
    return found


def prior_task(config: RunConfig, tokens: TokenSet | None = None) -> "TokenTask":
    """The task of a configuration; where `data.epoch_samples` is null, it becomes the number of training images."""
    tokens = TokenSet(config.data.source) if tokens is None else tokens
    return kind_of(config.task)(with_counted_tokens(config, tokens), tokens)


def with_counted_tokens(config: RunConfig, tokens: TokenSet) -> RunConfig:
    """The configuration with `data.epoch_samples` a number: where it is null, that of the training images."""
    if config.data.epoch_samples is not None:
        return config
    return replace(config, data=replace(config.data, epoch_samples=len(tokens.rows_or_all("train"))))


def load_prior(folder: Path) -> TrainedPrior:
    """The prior in a folder that a `TokenTask` exported.

    Raises:
        ValueError: There is none, it is damaged, or of a kind that is not known here.
    """
    if not (folder / FACTS).is_file():
        raise ValueError(
            f"{folder} holds no prior (no {FACTS}): give the run of a prior (`steadyvq train ar_tiny --data TOKENS`) that has "
            "trained to its first evaluation"
        )
    facts: Mapping[str, Any] = read_json(folder / FACTS)
    # The first priors had one kind, and did not name it.
    name = facts.get("kind", "autoregressive")
    if name not in KINDS:
        raise ValueError(
            f"{folder / FACTS} names a prior of the kind {name!r}, but this version of steadyvq knows {', '.join(KINDS)}: use "
            "the version that wrote it, or a newer one"
        )
    kind = kind_of(name)
    model = kind.build(facts)
    state = read_tensors(folder / WEIGHTS)
    check_fit(model.state_dict(), state, folder)
    model.load_state_dict(state)
    known = facts["tokenizer"]
    return TrainedPrior(kind, model.eval(), facts["classes"], known["hash"], known["name"], Path(facts["tokens"]))
