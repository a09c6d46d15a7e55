# SPDX-License-Identifier: Apache-2.0
"""Training a next-scale prior over stored tokens of the quantizer `multiscale`, as a task of the loop."""

from collections.abc import Mapping
from typing import Any

from steadyvq.generation.next_scale import NextScalePrior
from steadyvq.generation.prior_task import PriorTask
from steadyvq.quantizers import build_quantizer
from steadyvq.quantizers.methods.multiscale import MultiScale
from steadyvq.training.prior_config import PriorConfig
from steadyvq.training.strict import from_dict


class NextScaleTask(PriorTask):
    """A next-scale prior on stored tokens."""

    kind = "next_scale"
    prior: NextScalePrior

    def check_tokens(self) -> None:
        """Tokens of scales, of as many codes as the prior knows."""
        tokens, quantizer = self.tokens, self.tokenizer.quantizer
        if not isinstance(quantizer, MultiScale) or len(tokens.shape) != 1:
            raise ValueError(
                f"the tokens in {tokens.folder} are of the quantizer {(quantizer.spec or {}).get('name')!r}, but a next-scale "
                "prior needs tokens of several scales, one code each: tokenise with a tokenizer whose quantizer is `multiscale`"
            )
        if self.config.prior.vocabulary not in (None, tokens.num_codes):
            raise ValueError(
                f"prior.vocabulary is {self.config.prior.vocabulary:,}, but a next-scale prior reads its tokens through their "
                f"quantizer, which has {tokens.num_codes:,} codes: leave it out"
            )

    def make_prior(self) -> NextScalePrior:
        """An untrained prior for these tokens."""
        quantizer = self.tokenizer.quantizer
        assert isinstance(quantizer, MultiScale)
        return NextScalePrior(self.config.prior, quantizer, len(self.classes))

    def facts(self) -> dict[str, Any]:
        """The quantizer."""
        return {"quantizer": self.prior.quantizer.spec}

    @classmethod
    def build(cls, facts: Mapping[str, Any]) -> NextScalePrior:
        """The prior that was saved, without its weights."""
        quantizer = build_quantizer(**facts["quantizer"])
        assert isinstance(quantizer, MultiScale)
        return NextScalePrior(from_dict(PriorConfig, facts["config"], "prior"), quantizer, facts["num_classes"])
