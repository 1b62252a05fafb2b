"""What happens in a `generate` call, and where families may stand in it."""
