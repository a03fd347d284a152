"""What is checked before anything starts, and how it is said."""
