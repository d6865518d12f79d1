"""A bundle answers questions: the ``Session`` protocol, the one generation loop, and what is around it."""

from __future__ import annotations

MAX_TOKENS = 128  # how long an answer may become where nobody says otherwise
