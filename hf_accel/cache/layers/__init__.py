"""The layers that caches are made of."""
