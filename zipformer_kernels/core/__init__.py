"""What every op stands on: backends, the `Op`, what is asked once a call, autograd, and launches."""
