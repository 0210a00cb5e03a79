"""The Lightning side: configuration, environments, updates, checkpoints."""
