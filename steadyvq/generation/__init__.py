# SPDX-License-Identifier: Apache-2.0
"""From tokens to pictures: stored tokens of whole data sets, priors over them, samples and how they are judged."""

from steadyvq.generation.tokenise import TokenWriter
from steadyvq.generation.tokens import TokenSet, is_token_set, tokenizer_hash
from steadyvq.generation.views import Views

__all__ = ["TokenSet", "TokenWriter", "Views", "is_token_set", "tokenizer_hash"]
