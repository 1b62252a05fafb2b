"""Modules that hold their weights in few bits."""
