"""The HTTP API of an instance. The only package with HTTP types."""
