"""The engine: one loop for every task and any number of devices."""
