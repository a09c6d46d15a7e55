# SPDX-License-Identifier: Apache-2.0
"""`steadyvq transplant`: a new quantizer inside a trained encoder and decoder."""

import argparse
from pathlib import Path

from steadyvq.cli.common import say
from steadyvq.cli.train import begin
from steadyvq.training.transplant import plan


def transplant(arguments: argparse.Namespace) -> int:
    """Trains a new quantizer in the latents of a frozen encoder, then the decoder for its codes."""
    config, notes = plan(
        arguments.tokenizer,
        recipe=arguments.recipe,
        quantizer=arguments.quantizer,
        num_codes=arguments.codes,
        data=arguments.data,
        train=arguments.train,
        sets=arguments.set,
    )
    for note in notes:
        say(note)
    return begin(config, arguments.out or Path("runs") / "transplant", dry_run=arguments.dry_run)
