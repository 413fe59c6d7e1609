"""The pages for browsers: static files, which the API serves as they are.

``/console`` shows an operator the cluster, live. ``/`` is a playground with two users, served with
``--dev`` only. Both connect with the JavaScript client: ``static/vendor`` has a build of it.
"""

from pathlib import Path

STATIC = Path(__file__).parent / "static"
CONSOLE_PAGE = "console/index.html"
PLAYGROUND_PAGE = "playground/index.html"

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src {connect}; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    # Text from the API can't become markup.
    "require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY.format(connect="'self'"),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A browser may keep a file, but asks each time whether it is current.
    "Cache-Control": "no-cache",
}
"""What every file is served with."""
# The bridge may move its sessions to another instance. Everything else comes from this origin.
PLAYGROUND_HEADERS = HEADERS | {
    "Content-Security-Policy": _POLICY.format(connect="'self' ws: wss:")
}
