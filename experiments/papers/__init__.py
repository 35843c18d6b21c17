"""What the papers' protocols have in common: how their runs are made, read, judged and reported."""
