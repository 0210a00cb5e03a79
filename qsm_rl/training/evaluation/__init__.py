"""Episodes of a policy as it is, and videos of them."""
