"""``python -m edgevlm`` is the ``edgevlm`` command."""

from edgevlm.cli.app import main

if __name__ == "__main__":
    main()
