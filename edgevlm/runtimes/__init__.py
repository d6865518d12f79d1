"""A bundle answers questions: the ``Session`` protocol, the one generation loop, and what is around it."""
