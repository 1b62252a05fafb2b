"""GGUF files both ways: their blocks on our packed products without being expanded, and our packed weights as their blocks."""
