"""Monitors of a run: what the teacher's signal consists of, whether the student still thinks aloud, and the report."""
