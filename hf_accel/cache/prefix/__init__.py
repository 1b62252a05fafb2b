"""Keys and values of prompts that were read before."""
