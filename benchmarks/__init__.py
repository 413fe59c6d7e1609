"""What pokebridge costs, as ratios taken in one run; docs/benchmarks.md explains."""
