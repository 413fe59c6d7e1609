"""A deterministic simulation of a whole cluster on virtual time: see docs/simulation.md."""
