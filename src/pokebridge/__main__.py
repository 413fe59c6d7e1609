"""``python -m pokebridge`` is the command ``pokebridge``."""

from pokebridge.cli import main

main()
