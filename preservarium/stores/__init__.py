"""The only sockets to databases."""
