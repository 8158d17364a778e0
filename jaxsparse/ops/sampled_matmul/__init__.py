"""`x.T @ dy` at the kept blocks of a weight. The specification is `reference.py`, the names are in `api.py`."""
