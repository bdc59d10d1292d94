"""How a layer adds a module to its input: the ways to run a residual branch, and the rule of plain modules."""
