"""Training runs: `train.py` is the loop to read and fork, each module beside it one concept."""
