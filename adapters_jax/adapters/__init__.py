"""Adapter methods: values with pure functions at the sites a backbone offers."""
