"""From files, hubs and wheels to batches of token ids."""
