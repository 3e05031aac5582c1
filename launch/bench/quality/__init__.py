"""How close each method comes to dense attention."""
