"""What stands between the products of a branch that runs as one node: one file for each op."""
