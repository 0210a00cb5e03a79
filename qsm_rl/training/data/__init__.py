"""The path of frames from collectors to the replay buffer, and the files of both on disk."""
