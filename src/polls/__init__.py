"""How candidates are evaluated: many in one pass, exactly as one after the other."""
