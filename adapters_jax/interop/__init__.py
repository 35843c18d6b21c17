"""Checkpoints of others: Hugging Face backbones, and the files they come in."""
