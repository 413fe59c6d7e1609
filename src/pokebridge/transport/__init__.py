"""What carries signals between processes: the port, and its adapters."""
