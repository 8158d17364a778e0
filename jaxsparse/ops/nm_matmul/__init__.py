"""`x @ w` for N:M sparse `w`. A folder: the specification is `reference.py`, the names are in `api.py`."""
