"""The update of each algorithm, and the networks that only recipes need."""
