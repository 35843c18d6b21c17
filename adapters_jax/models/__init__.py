"""Backbones, built from one transformer block, and heads; they know sites but no adapter."""
