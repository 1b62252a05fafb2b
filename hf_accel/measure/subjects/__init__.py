"""What is measured on: models of published shapes, trained ones at the cost of larger ones, and one that retrieves."""
