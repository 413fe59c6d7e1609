"""Notifies a webhook of recipients that have not pulled their messages (docs/push-fallback.md)."""
