"""A recipient's durable log: the port, and its adapters."""
