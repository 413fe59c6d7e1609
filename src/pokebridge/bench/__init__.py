"""Load generators and their plots, behind the command `pokebridge bench`."""
