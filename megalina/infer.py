"""What was here is two packages now, and the old name says so."""

raise ImportError("megalina.infer is gone: its engine is megalina.serve, its evaluation megalina.evaluate; import from there")
