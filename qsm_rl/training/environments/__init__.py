"""The recipes' environments, batched, and running statistics of their observations."""
