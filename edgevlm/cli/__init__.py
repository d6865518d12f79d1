"""The ``edgevlm`` command: one module per verb, imported when the verb is used."""
