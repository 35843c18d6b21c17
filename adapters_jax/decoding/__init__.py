"""Writing texts: which word may come next, and which of all texts are looked for."""
