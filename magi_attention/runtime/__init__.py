"""Run a plan: the distributed loops, dispatch and undispatch, keys and their cache."""
