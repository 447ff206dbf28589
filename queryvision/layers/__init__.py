"""Building blocks without an opinion."""
