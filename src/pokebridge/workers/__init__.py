"""The worker processes of one host, and the channel between them and their hub (docs/cores.md)."""
