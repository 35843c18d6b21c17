"""What happens to a text before it is cut into word pieces: a chain of named steps."""
