"""Sources, fixed splits, and the batches that training sees."""
