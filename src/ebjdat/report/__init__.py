"""Tables, figures and one HTML page, from result files only. Never imports torch."""
