"""MLflow behind one small interface: what a stage logs, and where it stands in the UI."""
