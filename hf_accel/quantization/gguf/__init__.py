"""GGUF files both ways: their blocks on our packed products, never expanded, and our packed weights as their blocks."""
