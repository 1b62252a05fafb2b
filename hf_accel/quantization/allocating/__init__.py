"""Bits where they matter: what each group of products costs in each width, and the best choice within a budget."""
