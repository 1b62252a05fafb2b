"""What is done to a model: patchers, plans, and applying them."""
