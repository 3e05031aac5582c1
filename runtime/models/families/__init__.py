"""Model families: `facts` says what each is told by and needs (no torch), and one thin adapter each drives it."""
