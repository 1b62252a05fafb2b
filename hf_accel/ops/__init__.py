"""Pure torch mathematics: the reference that kernels are measured against, and what runs where no kernel does."""
