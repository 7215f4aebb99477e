"""What judges a sampled response."""
