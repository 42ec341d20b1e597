"""What is minimised: recipes, their terms, and the samples that they need."""
