"""Takes messages from a queue, besides HTTP (docs/ingress.md)."""
