"""Environments of the recipes, batched, and what is known of their observations."""
