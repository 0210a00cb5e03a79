"""A run's settings, and the choices that depend on the machine."""
