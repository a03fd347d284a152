"""The search: what an optimizer that needs losses only may ask, and how it decides."""
