"""Adapters where they are least known: translation, speech and images."""
