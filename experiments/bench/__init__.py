"""Measurements of time: each file is a command that compares a few ways to do one thing."""
