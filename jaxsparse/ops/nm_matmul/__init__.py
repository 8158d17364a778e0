"""`x @ w` for N:M sparse `w`."""
