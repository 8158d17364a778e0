"""`x @ w` for block-sparse `w`. A folder: the specification is `reference.py`, the names are in `api.py`."""
