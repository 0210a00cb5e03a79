"""One run from its first line to its published actor: Lightning module, callbacks, folder, logs."""
