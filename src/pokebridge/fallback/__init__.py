"""Tells a webhook of recipients that do not pull what they have (docs/push-fallback.md)."""
