"""How instances coordinate: the port, and its adapters over existing stores."""
