"""What each command does: read files, call the package, write files. Nothing here computes."""
