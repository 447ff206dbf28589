"""Tasks about fruit trees, for queryvision."""
