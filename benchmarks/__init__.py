"""What pokebridge costs, as ratios within one run; docs/benchmarks.md explains them."""
