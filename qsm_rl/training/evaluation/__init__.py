"""Evaluation episodes of the current policy, and videos of them."""
