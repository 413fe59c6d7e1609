"""What the fallback's tests share: a receiver."""
