"""What is minimised: terms, what is drawn for them, and their recipes."""
