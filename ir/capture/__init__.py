"""Front ends: one file for each kind of model."""
