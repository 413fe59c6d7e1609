"""This instance's place in its cluster: membership, the map, load, history. No HTTP."""
