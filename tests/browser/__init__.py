"""A package, for what its tests share ends with it."""
