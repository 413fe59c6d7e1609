"""How to reach an engine, for every port that rides on it: its URL, TLS, credentials, client."""
