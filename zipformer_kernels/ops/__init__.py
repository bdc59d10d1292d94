"""The fused operations: one folder each, with a reference, its backends, and its cases."""
