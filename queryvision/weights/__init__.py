"""Readers of published weights, one file a family, and where weights come from."""
