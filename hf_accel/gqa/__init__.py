"""Fewer key and value heads: multi-head models made into grouped-query or multi-query models."""
