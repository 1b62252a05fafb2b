"""Reading models in few bits: each tensor is rounded as it comes from the file, and then given up."""
