"""Several real instances on a real engine."""
