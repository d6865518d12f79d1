"""The one generation loop, for every back end."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice, takewhile

from edgevlm.runtimes.sampling import Sampler
from edgevlm.runtimes.session import Float, Session


def tokens(session: Session, embeds: Float, sample: Sampler) -> Iterator[int]:
    """Endless stream of token ids: prefill once, then decode one at a time."""
    token = sample(session.prefill(embeds))
    while True:
        yield token
        token = sample(session.decode(token))


def generate(
    session: Session, embeds: Float, *, sample: Sampler, stop: Collection[int], max_tokens: int
) -> Iterator[int]:
    """Token ids up to ``max_tokens``, ending before the first one in ``stop``."""
    answer = takewhile(lambda token: token not in stop, tokens(session, embeds, sample))
    return islice(answer, max_tokens)
