"""Weights rounded for what they read: layer by layer, resumable, and told whether it did what it says."""
