"""One instance on one port: the HTTP API, and the WebSockets beside it.

This package imports nothing by itself, so that a command that needs only an adapter does not wait
for the web framework.
"""
