"""Frames from collectors to the replay buffer, and both on the disk."""
