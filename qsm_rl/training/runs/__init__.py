"""One run from its summary to its saved actor: Lightning module, callbacks, folder, logs."""
