"""Load generators, the storm and their plots: what `pokebridge bench` runs."""
