"""What instances agree through: the port, and its adapters over stores that already exist."""
